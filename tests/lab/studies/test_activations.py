import pytest
import torch

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, where
from bnlab.lab.studies.activations import RATES, STUDY, Percentiles
from bnlab.lab.trained_network import train
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw, unchanged


def planted(gain: float, moved: float) -> Results:
    """With BN `gain` more are right from the first validation on, and the inputs move `moved` times as far."""
    results: Results = {"accuracy": [], "movement": [], "percentiles": []}
    for seed, noise in enumerate((0.97, 1.0, 1.03)):
        for arm in (WITH_BN, WITHOUT_BN):
            labels = {"arm": arm, "learning_rate": 1.0, "chosen": 1, "seed": seed}
            top1 = 0.5 + gain * noise * (arm == WITH_BN)
            for step in (10, 20):
                row = {"step": step, "test_top1": top1, "val_top1": top1, "n_test": 500, "diverged_at": None}
                results["accuracy"].append(labels | row)
            results["movement"].append(labels | {"movement": 2 * (moved * noise if arm == WITH_BN else 1.0)})
            for percentile in (15, 50, 85):
                results["percentiles"].append(labels | {"step": 0, "percentile": percentile, "value": percentile / 50})
    return results


@pytest.mark.parametrize(
    ("gain", "moved", "verdict"),
    [
        (0.1, 0.5, Verdict.HOLDS),
        (-0.1, 0.5, Verdict.DOES_NOT_HOLD),
        (0.1, 2.0, Verdict.DOES_NOT_HOLD),
        (0.1, 1.0, Verdict.NOT_SHOWN),
        (0.0001, 0.5, Verdict.NOT_SHOWN),
    ],
)
def test_the_verdict_follows_from_the_numbers(gain: float, moved: float, verdict: Verdict) -> None:
    conclusion = STUDY.conclude(planted(gain, moved))
    assert conclusion.verdict == verdict
    assert conclusion.numbers == {f"learning rate {arm}, mean": 1.0 for arm in (WITH_BN, WITHOUT_BN)}


def test_percentiles_and_movement_are_those_of_the_units() -> None:
    """Two units at three steps: the first keeps still, the second goes from 0 to 4, with a spread of 2."""
    probe = Percentiles(1)
    for step, at in enumerate((0.0, 3.0, 4.0)):
        still, moving = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0]) + at
        probe.seen.append((step, torch.stack([still, moving], 1)))
    results = probe.summary()
    assert results["movement"] == [{"movement": 0.0, "units": 2}]  # torch's median is the lower of two
    assert [row["value"] for row in where(results["percentiles"], percentile=85)] == [1.0, 4.0, 5.0]
    assert [row["step"] for row in where(results["percentiles"], percentile=15)] == [0, 1, 2]


def test_the_inputs_of_the_sigmoids_are_recorded_and_nothing_changes(
    make_experiment: MakeExperiment, job: JobContext
) -> None:
    recipe = make_experiment().recipe("bn_mlp", width=1.0)
    probe = Percentiles(3)
    trained = train(job, recipe, probe=probe)
    assert [step for step, _ in probe.seen] == [0, 3]
    network, images = trained.context.network, probe.images
    with unchanged(network):
        probe.before(6, trained.context)
    x = network.pixels(images)
    with torch.no_grad():
        for name in ("hidden1", "hidden2", "hidden3"):
            unit = network.get_submodule(name)
            x = unit.linear(x.flatten(1))
            x = (x - x.mean(0)) / (x.var(0, unbiased=False) + unit.bn.eps).sqrt() * unit.bn.weight + unit.bn.bias
            last, x = x, x.sigmoid()
    found = probe.seen[-1][1]
    assert torch.allclose(found, last.quantile(torch.tensor([0.15, 0.5, 0.85]), dim=0), atol=1e-4)


@pytest.mark.slow
def test_it_is_measured(make_experiment: MakeExperiment) -> None:
    results = STUDY.measure(make_experiment(width=1.0))
    assert {row["learning_rate"] for row in results["accuracy"]} == set(RATES)
    draw(STUDY.conclude(results))
