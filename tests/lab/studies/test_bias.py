import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bnlab.lab.bench import WITH_BN, Bench
from bnlab.lab.centred import ALL, ALONE, ARMS, WITHIN
from bnlab.lab.records import Records, Tables, where
from bnlab.lab.studies.bias import INCEPTION, SIGMOIDS, STUDY, WITH_BIAS, WITHOUT_BIAS, Biases, judge, make_precise
from bnlab.lab.verdict import Verdict
from bnlab.nets.blocks import units_of
from bnlab.recipe import Recipe
from bnlab.report.plots import plot_svg


def planted(
    *,
    gradient: float = 1e-6,
    distance: float = 1e-12,
    better: tuple[float, ...] = (-0.004, 0.0, 0.004),
    outside: float = 1.0,
    late: float = 1.0,
    loss: float = 2.3,
) -> Tables:
    biases: Records = []
    twins: Records = []
    growth: Records = []
    trained: Records = []
    end = {"step": 20, "n_test": 500, "diverged_at": None}
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
    assert judge(planted(**wrong)).verdict == verdict


@pytest.mark.parametrize(
    ("better", "verdict"),
    [
        ((-0.004, 0.0, 0.004), Verdict.HOLDS),
        ((0.049, 0.05, 0.051), Verdict.DOES_NOT_HOLD),
        ((-0.05, 0.0, 0.05), Verdict.NOT_SHOWN),
    ],
)
def test_accuracy_beside(better: tuple[float, ...], verdict: Verdict) -> None:
    findings = judge(planted(better=better))
    assert findings.evidence[2].verdict == verdict
    assert findings.verdict == Verdict.HOLDS


def test_twins_begin_with_the_same_weights_and_biases_of_0() -> None:
    recipe = Recipe(network="bn_small_inception", width=0.25)
    plain, biased = (
        make_precise(recipe.model_copy(update={"conv_bias": bias}), 3, torch.float64) for bias in (False, True)
    )
    theirs = biased.state_dict()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(theirs[name], tensor), name
    more = theirs.keys() - plain.state_dict().keys()
    assert len(more) == len(units_of(plain))
    assert not any(theirs[name].any() for name in more)
    assert plain(torch.rand(2, 3, 32, 32)).dtype == torch.float64


class ATrainee:
    def __init__(self, *, bias: bool) -> None:
        recipe = Recipe(network="bn_mlp", width=0.05, conv_bias=bias)
        self.network = make_precise(recipe, 2, torch.float64)


def test_gradients_and_distance_by_hand() -> None:
    plain, biased = Biases(1, None), ATrainee(bias=True)
    trainee: Any = ATrainee(bias=False)
    plain.before(0, trainee)
    plain.after(0, trainee)
    witness = Biases(1, plain)
    trainee = biased
    before, state = copy.deepcopy(biased.network.state_dict()), torch.get_rng_state()
    witness.before(0, trainee)
    unit = units_of(biased.network)[0]
    loss = (unit.layer.bias * torch.tensor([3.0, 4.0, 0, 0, 0])).sum() + unit.layer.weight[0, 0] * 2 + unit.bn.bias[1]
    loss.backward()
    witness.after(0, trainee)
    torch.testing.assert_close(biased.network.state_dict(), before, rtol=0, atol=0)
    with torch.no_grad():
        biased.network.fc.weight.add_(1.0)
    witness.before(1, trainee)
    plain.kept[2] = plain.kept[1]
    witness.squares = {"bias": 0.0, "weight": 1.0, "beta": 1.0}
    witness.after(1, trainee)
    first, second = witness.tables["biases"]
    assert first == {"step": 1, "distance": 0.0, "of_weights": 2.5, "of_beta": 5.0}
    length = sum(float(p.square().sum()) for p in plain.kept[1].values()) ** 0.5
    assert second["distance"] == pytest.approx((2 * 5) ** 0.5 / length)  # fc has 2 x 5 weights
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p._backward_hooks for p in biased.network.parameters())


def test_measures_and_judges(make_bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "twins", lambda _: {WITH_BN: "bn_mlp"})
    tables = STUDY.measure(make_bench(steps=4))
    findings = judge(tables)
    assert max(float(row["distance"] or 0) for row in where(tables["biases"], pair=SIGMOIDS)) < 1e-9
    assert [each.verdict for each in findings.evidence[:2]] == [Verdict.HOLDS] * 2
    for plot in findings.plots.values():
        assert plot_svg(plot).startswith("<svg")
