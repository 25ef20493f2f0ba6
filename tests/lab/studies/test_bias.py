import copy
import math
from typing import Any

import pytest
import torch

from bnlab.lab.records import Records, Results, where
from bnlab.lab.studies.bias import (
    ALL,
    ALONE,
    ARMS,
    INCEPTION,
    OUTSIDE,
    SCALED,
    SIGMOIDS,
    STUDY,
    WITH_BIAS,
    WITHIN,
    WITHOUT_BIAS,
    Biases,
    DetachedMean,
    Growth,
    conclude,
    make_network,
    make_precise,
)
from bnlab.lab.verdict import Verdict
from bnlab.nets.blocks import conv_norm_acts
from bnlab.recipe import Recipe
from tests.lab.studies.helpers import MakeExperiment, draw, has_no_number


def planted(
    *,
    gradient: float = 1e-6,
    distance: float = 1e-12,
    better: tuple[float, ...] = (-0.004, 0.0, 0.004),
    outside: float = 1.0,
    late: float = 1.0,
    loss: float = 2.3,
) -> Results:
    biases: Records = []
    twins: Records = []
    growth: Records = []
    trained: Records = []
    end = {"step": 20, "n_test": 500, "guess": 0.1, "diverged_at": None}
    for seed, more in enumerate((0.9, 1.0, 1.1)):
        for pair in (INCEPTION, SIGMOIDS):
            row = {"distance": distance * more, "of_weights": gradient * more, "of_beta": 10 * gradient}
            biases.append({"pair": pair, "seed": seed, "step": 20, **row})
            for arm, top1 in ((WITHOUT_BIAS, 0.9), (WITH_BIAS, 0.9 + better[seed])):
                twins.append({"pair": pair, "seed": seed, "arm": arm, "test_top1": top1, **end})
        for learned in (ALONE, ALL):
            for arm in ARMS:
                norm = 1e-9 if arm == WITHIN else outside * more
                for step, share, value in ((0, 0.0, 2.3), (10, 1.0, 2.3), (20, 1.0 + late, loss)):
                    row = {"step": step, "norm": share * norm, "loss": value}
                    growth.append({"learned": learned, "seed": seed, "arm": arm, **row})
                trained.append({"learned": learned, "seed": seed, "arm": arm, "test_top1": 0.5, **end})
    return {"biases": biases, "twins": twins, "growth": growth, "trained": trained}


@pytest.mark.parametrize("late", [0.0, -0.2])
def test_biases_that_stop_refute(late: float) -> None:
    assert conclude(planted(late=late)).verdict is Verdict.DOES_NOT_HOLD


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ({}, Verdict.HOLDS),
        ({"gradient": 0.1}, Verdict.DOES_NOT_HOLD),
        ({"distance": 0.1}, Verdict.DOES_NOT_HOLD),
        ({"outside": 1e-6}, Verdict.NOT_SHOWN),
        ({"outside": 1e-8}, Verdict.DOES_NOT_HOLD),
        ({"late": 0.1}, Verdict.DOES_NOT_HOLD),
        ({"loss": 2.2}, Verdict.DOES_NOT_HOLD),
    ],
)
def test_verdict(wrong: dict[str, Any], verdict: Verdict) -> None:
    assert conclude(planted(**wrong)).verdict == verdict


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ((-0.004, 0.0, 0.004), Verdict.HOLDS),
        ((0.049, 0.05, 0.051), Verdict.DOES_NOT_HOLD),
        ((-0.05, 0.0, 0.05), Verdict.NOT_SHOWN),
    ],
)
def test_accuracy_is_secondary(better: tuple[float, ...], verdict: Verdict) -> None:
    conclusion = conclude(planted(better=better))
    assert conclusion.evidence[2].verdict == verdict
    assert conclusion.verdict == Verdict.HOLDS


def test_pairs_begin_with_the_same_weights_and_biases_of_0() -> None:
    recipe = Recipe(network="bn_small_inception", width=0.25)
    plain, biased = (
        make_precise(recipe.model_copy(update={"conv_bias": bias}), 3, torch.float64) for bias in (False, True)
    )
    theirs = biased.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    more = theirs.keys() - plain.state_dict().keys()
    assert len(more) == len(conv_norm_acts(plain))
    assert not any(theirs[name].any() for name in more)
    assert plain(torch.rand(2, 3, 32, 32)).dtype == torch.float64


class Context:
    def __init__(self, *, bias: bool) -> None:
        recipe = Recipe(network="bn_mlp", width=0.05, conv_bias=bias)
        self.network = make_precise(recipe, 2, torch.float64)


def test_a_seed_whose_training_diverged_shows_nothing() -> None:
    results = planted()
    gone: list[dict[str, Any]] = [
        {"pair": INCEPTION, "arm": WITHOUT_BIAS, "seed": 0},
        {"learned": ALONE, "arm": OUTSIDE, "seed": 1},
    ]
    for name, which in zip(("twins", "trained"), gone, strict=True):
        where(results[name], **which)[0]["diverged_at"] = 3
    results["growth"] = [row for row in results["growth"] if not (gone[1].items() <= row.items() and row["step"])]
    conclusion = conclude(results)
    gradient, distance, accuracy, grow, go_on, fixed, real = map(has_no_number, conclusion.evidence)
    assert gradient == accuracy == [True, False, False]
    assert grow == go_on == fixed == [False, True, False]
    assert not any(distance + real)
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert conclusion.remarks == (
        f"{INCEPTION}, {WITHOUT_BIAS}: seed 0 diverged",
        f"{OUTSIDE}, {ALONE} trained: seed 1 diverged",
    )


def test_what_was_not_seen_or_is_not_finite_shows_nothing() -> None:
    results = planted()
    results["biases"] = [row for row in results["biases"] if (row["pair"], row["seed"]) != (SIGMOIDS, 2)]
    for row in where(results["biases"], pair=INCEPTION, seed=0):
        row |= {"of_weights": math.nan, "of_beta": math.nan, "distance": math.inf}
    for row in where(results["growth"], learned=ALONE, arm=OUTSIDE):
        row |= {"norm": 0.0 if row["seed"] == 1 else row["norm"], "loss": 0.0 if row["seed"] == 1 else row["loss"]}
    where(results["twins"], pair=INCEPTION, arm=WITH_BIAS, seed=1)[0]["test_top1"] = 0.15
    conclusion = conclude(results)
    gradient, distance, accuracy, _, go_on, fixed, _ = map(has_no_number, conclusion.evidence)
    assert gradient == [True, False, False]
    assert distance == [False, False, True]
    assert accuracy == go_on == fixed == [False, True, False]
    draw(conclusion)


def test_steps_that_the_other_did_not_come_to_are_left_out() -> None:
    context: Any = Context(bias=True)
    probe = Biases(1, Biases(1, None))
    probe.before(0, context)
    probe.after(0, context)
    assert not probe.results


def test_gradients_and_distance_by_hand() -> None:
    plain, biased = Biases(1, None), Context(bias=True)
    context: Any = Context(bias=False)
    plain.before(0, context)
    plain.after(0, context)
    probe = Biases(1, plain)
    context = biased
    before, state = copy.deepcopy(biased.network.state_dict()), torch.get_rng_state()
    probe.before(0, context)
    unit = conv_norm_acts(biased.network)[0]
    loss = (unit.layer.bias * torch.tensor([3.0, 4.0, 0, 0, 0])).sum() + unit.layer.weight[0, 0] * 2 + unit.bn.bias[1]
    loss.backward()
    probe.after(0, context)
    torch.testing.assert_close(biased.network.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        biased.network.fc.weight.add_(1.0)
    probe.before(1, context)
    plain.kept[2] = plain.kept[1]
    probe.squares = {"bias": 0.0, "weight": 1.0, "beta": 1.0}
    probe.after(1, context)
    plain.kept[3] = plain.kept[1]
    probe.before(2, context)
    probe.after(2, context)  # nothing has a gradient
    first, second, third = probe.results["biases"]
    assert math.isnan(float(third["of_weights"] or 0)) and math.isnan(float(third["of_beta"] or 0))
    assert first == {"step": 1, "distance": 0.0, "of_weights": 2.5, "of_beta": 5.0}
    length = sum(float(p.square().sum()) for p in plain.kept[1].values()) ** 0.5
    assert second["distance"] == pytest.approx((2 * 5) ** 0.5 / length)  # fc has 2 x 5 weights
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p._backward_hooks for p in biased.network.parameters())


@pytest.mark.parametrize("arm", ARMS)
def test_output_has_no_mean_whatever_the_bias(arm: str) -> None:
    u = torch.tensor([[1.0, 5.0], [3.0, 9.0]])
    layer = DetachedMean(2, arm)
    before = layer(u)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([7.0, -3.0]))
    torch.testing.assert_close(layer(u), before)
    expected = torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) if arm == SCALED else torch.tensor([[-1.0, -2.0], [1.0, 2.0]])
    torch.testing.assert_close(before, expected, rtol=1e-4, atol=0)


def test_gradient_of_the_bias_is_the_papers() -> None:
    weighting = torch.tensor([[2.0], [3.0]])
    expected = {WITHIN: 0.0, OUTSIDE: 5.0, SCALED: 5.0}  # -db is the sum of dl/dxhat where E[x] is ignored
    for arm, gradient in expected.items():
        layer = DetachedMean(1, arm)
        (layer(torch.tensor([[-1.0], [1.0]])) * weighting).sum().backward()
        assert layer.bias.grad is not None
        assert float(layer.bias.grad) == pytest.approx(gradient, rel=1e-4)


def test_maps_are_centred_over_photos_and_positions() -> None:
    x = torch.arange(16.0).view(2, 2, 2, 2)
    y = DetachedMean(2, WITHIN)(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2))
    assert y.shape == x.shape
    with pytest.raises(ValueError, match=r"DetachedMean takes N x 3 x \.\.\., and got \[2, 2, 2, 2\]"):
        DetachedMean(3, WITHIN)(x)


@pytest.mark.parametrize("alone", [True, False])
def test_alone_nothing_but_the_biases_is_trained(alone: bool) -> None:
    network = make_network(Recipe(network="mlp", width=0.05), 2, OUTSIDE, alone=alone)
    trained = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    biases = {f"hidden{i}.bn.bias" for i in (1, 2, 3)}
    weights = {f"hidden{i}.linear.weight" for i in (1, 2, 3)} | {"fc.weight", "fc.bias"}
    assert trained == (biases if alone else biases | weights)


class DetachedContext:
    def __init__(self) -> None:
        self.network = make_network(Recipe(network="mlp", width=0.05), 2, OUTSIDE, alone=True)


def test_growth_by_hand_leaves_the_network_alone() -> None:
    context: Any = DetachedContext()
    probe = Growth(every=2)
    probe.images, probe.labels = torch.rand(6, 3, 28, 28), torch.tensor([0, 1] * 3)
    with torch.no_grad():
        for value, unit in zip((3.0, 4.0, 12.0), conv_norm_acts(context.network), strict=True):
            assert isinstance(unit.bn.bias, torch.nn.Parameter)
            unit.bn.bias[0] = value
        context.network.fc.weight.zero_()
    before, state = copy.deepcopy(context.network.state_dict()), torch.get_rng_state()
    context.network.train()
    for step in range(3):
        probe.before(step, context)
        probe.after(step, context)
    rows = probe.results["growth"]
    assert [row["step"] for row in rows] == [0, 2]
    assert {row["norm"] for row in rows} == {13.0}
    assert [row["loss"] for row in rows] == pytest.approx([0.6931472] * 2)
    assert context.network.training
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(context.network.state_dict(), before, rtol=0, atol=0)


@pytest.mark.usefixtures("mlps")
def test_from_photos_to_plots(make_experiment: MakeExperiment) -> None:
    results = STUDY.measure(make_experiment(steps=4))
    conclusion = conclude(results)
    assert max(float(row["distance"] or 0) for row in where(results["biases"], pair=SIGMOIDS)) < 1e-9
    assert [each.verdict for each in conclusion.evidence[:2]] == [Verdict.HOLDS] * 2
    draw(conclusion)
