import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN
from bnlab.lab.records import Records, Results, numbers
from bnlab.lab.studies.scale_invariance import EXACT, FACTORS, STUDY, USUAL, Norms, conclude, normalised_layers, scaled
from bnlab.lab.verdict import Verdict
from bnlab.nets import build
from bnlab.norm import BatchNorm1d
from tests.lab.studies.helpers import MakeExperiment, draw


def planted(output: float = 1e-14, cosine: float = 1e-6, end: float = 1.2) -> Results:
    noise = (0.99, 1.0, 1.01)
    seeds = list(enumerate(noise))
    change = {"output": output, "input_gradient": 1e-14, "weight_gradient": 1e-14, "predicted": output}
    rows: Records = [
        {"arm": WITH_BN, "seed": seed, "kind": kind, "layer": "conv1", "factor": a, "dead": 0.0}
        | {key: value * more for key, value in change.items()}
        for seed, more in seeds
        for kind in (EXACT, USUAL)
        for a in FACTORS
    ]
    training: Records = []
    for arm in (WITH_BN, WITHOUT_BN):
        for seed, more in seeds:
            same = {"arm": arm, "seed": seed, "layer": "conv1"}
            first = {"step": 0, "relative_norm": 1.0, "predicted_norm": 1.0, "cosine": None}
            after = {"step": 10, "relative_norm": end * more, "predicted_norm": end, "cosine": cosine * more}
            training += [{**same, **first}, {**same, **after}]
    return {"scaled": rows, "training": training}


@pytest.mark.parametrize(
    ("wrong", "verdict"),
    [
        ({}, Verdict.HOLDS),
        ({"output": 1e-3}, Verdict.DOES_NOT_HOLD),
        ({"cosine": 0.03}, Verdict.DOES_NOT_HOLD),
        ({"end": 0.9}, Verdict.DOES_NOT_HOLD),
        ({"end": 1.001}, Verdict.NOT_SHOWN),
    ],
)
def test_verdict(wrong: dict[str, float], verdict: Verdict) -> None:
    assert conclude(planted(**wrong)).verdict == verdict


def a_layer() -> tuple[nn.Linear, BatchNorm1d, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    layer, bn = nn.Linear(3, 2, bias=False), BatchNorm1d(2)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(2, 3, generator=random))
        bn.weight.copy_(torch.tensor([0.5, 2.0]))
        bn.bias.copy_(torch.tensor([1.0, -1.0]))
    return layer, bn, torch.randn(16, 3, generator=random)


def test_without_eps_nothing_changes_but_by_rounding() -> None:
    rows = list(scaled("one", *a_layer(), torch.float64, 1e-30, kind=EXACT, seed=0))
    assert numbers(rows, "factor") == list(FACTORS)
    for column in ("output", "input_gradient", "weight_gradient"):
        assert 0 < max(numbers(rows, column)) < 1e-12


def test_what_eps_changes_is_what_the_formula_says() -> None:
    layer, bn, u = a_layer()
    eps = 0.01
    rows = list(scaled("one", layer, bn, u, torch.float64, eps, kind=USUAL, seed=0))
    x = (u.double() @ layer.weight.detach().double().T).numpy()

    def normalised(a: float) -> Any:
        return (a * x - a * x.mean(0)) / (a**2 * x.var(0) + eps) ** 0.5 * [0.5, 2.0] + [1.0, -1.0]

    for row in rows:
        change = normalised(float(row["factor"])) - normalised(1.0)  # type: ignore[arg-type]
        expected = (change**2).sum() ** 0.5 / (normalised(1.0) ** 2).sum() ** 0.5
        assert row["output"] == pytest.approx(expected, rel=1e-9)
        assert row["predicted"] == pytest.approx(expected, rel=1e-9)


def test_a_channel_that_nothing_reaches_is_left_out() -> None:
    layer, bn, u = a_layer()
    with torch.no_grad():
        layer.weight[0] = 0
    rows = list(scaled("one", layer, bn, u, torch.float64, 1e-30, kind=EXACT, seed=0))
    assert {row["dead"] for row in rows} == {0.5}
    assert max(numbers(rows, "output")) < 1e-12


def test_layers_are_those_of_a_copy() -> None:
    network = build("bn_small_inception", classes=3, width=0.25)
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    found = list(normalised_layers(network, torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))))
    assert next(name for name, *_ in found) == "conv1"
    assert len(found) == 43
    assert all(u.shape[1] == layer.weight.shape[1] for _, layer, _, u in found)
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_pre_hooks for module in network.modules())


class Context:
    """What the probe reads of a training."""

    def __init__(self, weight: list[float]) -> None:
        self.network = build("mlp", classes=2, width=0.01)  # one unit to a layer
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.5)
        self.weight = self.network.hidden2.linear.weight  # 1 x 1
        with torch.no_grad():
            self.weight.copy_(torch.tensor([weight]))

    def step(self, gradient: float) -> None:
        images = torch.zeros(2, 3, 28, 28)
        loss = self.network(images).sum() * 0 + (self.weight * gradient).sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_norms_of_a_weight_by_hand() -> None:
    context: Any = Context([3.0])
    probe = Norms(1)
    probe.before(0, context)
    context.step(2.0)
    probe.after(0, context)
    first, second = (row for row in probe.results["training"] if row["layer"] == "hidden2")
    assert first == {"step": 0, "layer": "hidden2", "relative_norm": 1.0, "predicted_norm": 1.0, "cosine": None}
    assert second["relative_norm"] == pytest.approx(2 / 3)  # 3 - 0.5 * 2
    assert second["predicted_norm"] == pytest.approx(math.sqrt(9 + 1) / 3)
    assert second["cosine"] == pytest.approx(1.0)
    assert not context.weight._backward_hooks
    later = Norms(1)
    later.load_state_dict(probe.state_dict())
    assert later.squares == probe.squares


@pytest.mark.slow
@pytest.mark.usefixtures("mlps")
def test_from_photos_to_plots(make_experiment: MakeExperiment) -> None:
    results = STUDY.measure(make_experiment(steps=4))
    conclusion = conclude(results)
    assert all(each.verdict == Verdict.HOLDS for each in conclusion.evidence[:3])
    assert conclusion.evidence[5].mean == pytest.approx(1, abs=1e-2)  # the norms are what right angles predict
    draw(conclusion)
