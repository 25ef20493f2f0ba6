import pytest
import torch

from bnlab.lab.records import Records, Results
from bnlab.lab.studies import batch_size
from bnlab.lab.studies.batch_size import BATCH, RECALIBRATED, RUNNING, WHOLE, conclude, sizes, whole_batches
from bnlab.lab.verdict import Verdict
from bnlab.nets.build import build
from bnlab.norm import recalibrate
from tests.lab.studies.helpers import MakeExperiment, draw

SEEDS = range(4)
NOISE = (0.0, 0.004, -0.004, 0.002)


def results(recalibrated: dict[str, float], whole: dict[str, float], *, noise: float = 1.0) -> Results:
    """Accuracies by size at the rate that was chosen (0.3); at the other one all sizes are at 0.1."""
    statistics: Records = []
    accuracies: Records = []
    for arm in recalibrated:
        for rate, chosen in ((0.1, 0), (0.3, 1)):
            for seed in SEEDS:
                labels = {"arm": arm, "learning_rate": rate, "chosen": chosen, "seed": seed}
                accuracies.append({**labels, "val_top1": 0.5, "diverged_at": None})
                for kind in (RUNNING, RECALIBRATED, WHOLE, BATCH):
                    for side in ("train", "test"):
                        top1 = (whole if kind == WHOLE else recalibrated)[arm] if chosen else 0.1
                        wobble = noise * NOISE[(seed + int(arm)) % 4]
                        row = {"side": side, "statistics": kind, "top1": top1 + wobble, "n_test": 1000}
                        statistics.append({**labels, **row})
    return {"accuracy": accuracies, "statistics": statistics}


GOOD = {"2": 0.7, "8": 0.8, "32": 0.9, "64": 0.8}


def test_two_are_too_few_where_both_recalibrations_leave_them_behind() -> None:
    conclusion = conclude(results(GOOD, GOOD))
    assert conclusion.verdict is Verdict.HOLDS
    assert [round(each.mean) for each in conclusion.evidence if each.primary] == [20, 20]


def test_they_are_not_where_whole_batches_repair_them() -> None:
    conclusion = conclude(results(GOOD, GOOD | {"2": 0.92}))
    assert [each.verdict for each in conclusion.evidence if each.primary] == [Verdict.HOLDS, Verdict.DOES_NOT_HOLD]
    assert conclusion.verdict is Verdict.DOES_NOT_HOLD


def test_nor_where_they_are_as_accurate() -> None:
    assert conclude(results(GOOD | {"2": 0.95}, GOOD)).verdict is Verdict.DOES_NOT_HOLD


def test_noise_shows_nothing() -> None:
    assert conclude(results(GOOD | {"2": 0.899}, GOOD, noise=10)).verdict is Verdict.NOT_SHOWN


def test_the_whole_batch_and_one_rate_for_all_are_secondary() -> None:
    planted = results(GOOD, GOOD)
    for row in planted["statistics"]:
        if row["arm"] == "32":  # took the lower rate, at which parts of 2 are at 0.1
            row["chosen"] = 1 - int(row["chosen"] or 0)
            row["top1"] = 0.9 if row["chosen"] else 0.2
    found = {each.what: each for each in conclude(planted).evidence if not each.primary}
    at_one_rate = next(each for what, each in found.items() if "at the rate of" in what)
    assert at_one_rate.mean == pytest.approx(80, abs=1)
    ghosts = next(each for what, each in found.items() if "whole batch of 64" in what)
    assert ghosts.mean == pytest.approx(10, abs=1)


def test_layers_take_whole_batches_and_then_parts_again() -> None:
    network = build("bn_small_inception", classes=3, width=0.25, norm="ghost:2").eval()
    whole = build("bn_small_inception", classes=3, width=0.25, norm="batch").eval()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    recalibrate(whole, [images])
    recalibrate(network, [images])
    by_parts = network.state_dict()["inception4a.branch1.bn.running_var"].clone()
    with whole_batches(network, 8):
        recalibrate(network, [images])
    for name, statistics in whole.state_dict().items():
        torch.testing.assert_close(network.state_dict()[name], statistics, rtol=1e-4, atol=1e-5, msg=name)
    recalibrate(network, [images])
    by_parts_again = network.state_dict()["inception4a.branch1.bn.running_var"]
    assert torch.equal(by_parts_again, by_parts)
    assert not torch.allclose(by_parts, whole.state_dict()["inception4a.branch1.bn.running_var"], rtol=1e-2)


def test_sizes_end_with_the_whole_batch(make_experiment: MakeExperiment) -> None:
    assert sizes(make_experiment(), 32) == [2, 4, 8, 32]
    assert sizes(make_experiment(), 12) == [2, 4, 8, 12]
    assert sizes(make_experiment(), 64) == [2, 4, 8, 32, 64]


@pytest.mark.slow
def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "sizes", lambda experiment, whole: [2, whole])
    found = batch_size.measure(make_experiment(steps=3, size=16, seeds=1))
    assert {row["arm"] for row in found["statistics"]} == {"2", "12"}
    assert len(found["statistics"]) == 2 * 2 * 6  # sizes, rates, kinds on their splits
    assert all(row["step"] == 3 for row in found["accuracy"])
    draw(conclude(found))
