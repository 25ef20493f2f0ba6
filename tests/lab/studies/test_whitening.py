from collections.abc import Sequence

import pytest
import torch

from bnlab.lab.measurements import JobContext, Measurement
from bnlab.lab.records import Records, Results, number, numbers, where
from bnlab.lab.studies.whitening import BN, STUDY, WHITENING, conclude, costs
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw, has_no_number


def planted(
    cost: tuple[float, ...] = (1.9, 2.0, 2.1), tops: tuple[float, ...] = (0.5, 0.9), bn: float = 0.9
) -> Results:
    """Whitening costs so many times as much and reaches `tops` after 50 and 100 steps; BN reaches `bn` at once."""
    costs_: Records = []
    rows: Records = []
    for seed, times in enumerate(cost):
        for arm, each, curve in ((BN, 10.0, (bn, bn)), (WHITENING, 10.0 * times, tops)):
            costs_.append({"arm": arm, "seed": seed, "milliseconds": each})
            for step, top1 in zip((50, 100), curve, strict=True):
                named = {"arm": arm, "seed": seed, "learning_rate": 0.1, "chosen": 1, "step": step, "diverged_at": None}
                result = {"seconds": step * each / 1000, "test_top1": top1, "guess": 0.1, "n_test": 500}
                rows.append({**named, **result})
    return {"cost": costs_, "accuracy": rows}


@pytest.mark.parametrize(
    ("results", "verdict"),
    [
        (planted(), Verdict.HOLDS),
        (planted(cost=(0.5, 0.51, 0.52)), Verdict.DOES_NOT_HOLD),
        (planted(cost=(1.04, 1.05, 1.06)), Verdict.DOES_NOT_HOLD),  # longer, but not so that it matters
        (planted(cost=(0.5, 1.0, 2.0)), Verdict.NOT_SHOWN),
        (planted(tops=(0.9, 0.95), bn=0.7), Verdict.DOES_NOT_HOLD),
    ],
)
def test_verdict(results: Results, verdict: Verdict) -> None:
    assert conclude(results).verdict == verdict


@pytest.mark.parametrize(
    ("cost", "whitening"),
    [
        (2.0, 0.5),
        (4.0, 0.3),
        (4 / 3, 0.7),
        (0.5, 0.9),
    ],  # BN is done when whitening has done 50, 25, 75 steps; or before
)
def test_accuracy_at_equal_time_is_read_off_the_curve(cost: float, whitening: float) -> None:
    conclusion = conclude(planted(cost=(cost, cost)))
    assert conclusion.evidence[1].values == pytest.approx([100 * (0.9 - whitening)] * 2)


def test_the_accuracy_by_the_step_is_secondary() -> None:
    conclusion = conclude(planted(tops=(0.2, 0.3)))
    assert conclusion.evidence[2].verdict == Verdict.DOES_NOT_HOLD
    assert conclusion.verdict == Verdict.HOLDS


def test_untrained_networks_do_not_compare() -> None:
    results = planted()
    results["accuracy"] = [row | {"test_top1": 0.15} if row["seed"] == 1 else row for row in results["accuracy"]]
    conclusion = conclude(results)
    for evidence in conclusion.evidence[1:]:
        assert has_no_number(evidence) == [False, True, False]
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert "seed 1: neither network learnt, so they do not compare" in conclusion.remarks


def test_a_seed_without_one_of_them_shows_nothing() -> None:
    results = {
        name: [row for row in rows if (row["arm"], row["seed"]) != (WHITENING, 0)] for name, rows in planted().items()
    }
    conclusion = conclude(results)
    for evidence in conclusion.evidence:
        assert has_no_number(evidence) == [True, False, False]
    draw(conclusion)


def test_costs_are_medians_of_interleaved_steps(
    make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_experiment()
    recipe = experiment.recipe("bn_mlp", size=16)
    order: list[str] = []
    spans = [0.0] * 4 + [1.0, 20.0, 3.0, 10.0, 2.0, 30.0]  # of two steps to warm up, then of three of each in turn
    clock = iter([time for span in spans for time in (5.0, 5.0 + span)])
    monkeypatch.setattr("bnlab.lab.studies.whitening._now", lambda _: next(clock))
    monkeypatch.setattr(
        "bnlab.lab.studies.whitening.train_step",
        lambda context, *_: order.append(context.recipe.norm) or rates.add(context.optimizer.param_groups[0]["lr"]),
    )
    rates: set[float] = set()
    reported: list[int] = []
    job = JobContext(
        split=experiment.splits.for_seed(0),
        folder=experiment.folder,
        device="cpu",
        seed=0,
        report_steps=reported.append,
    )
    state = torch.get_rng_state()
    found = costs(job, recipe, {BN: "batch", WHITENING: "whitening:4"}, rounds=3, machine={"gpu": "a"})
    assert torch.equal(torch.get_rng_state(), state)
    assert order == ["batch", "whitening:4"] * 5
    assert sum(reported) == 10
    assert found["cost"] == [
        {"arm": BN, "milliseconds": 2000, "gpu": "a"},
        {"arm": WHITENING, "milliseconds": 20_000, "gpu": "a"},
    ]
    assert rates == {0.0}


def test_timing_is_alone_and_of_this_machine(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make_experiment()
    kept: list[tuple[bool, set[str]]] = []
    there = {"processor": "", "threads": 1, "gpu": None}

    def keep(measurements: Sequence[Measurement], *, one_at_a_time: bool = False) -> Results:
        kept.append((one_at_a_time, {cell.key("cpu") for cell in measurements}))
        return {}

    monkeypatch.setattr(experiment, "run", keep)
    monkeypatch.setattr("bnlab.lab.studies.whitening.environment", lambda _: there)
    for processor in ("fast", "slow"):
        there["processor"] = processor
        with pytest.raises(KeyError):  # for nothing was measured
            STUDY.measure(experiment)
    assert [alone for alone, _ in kept] == [True, False] * 2
    assert not kept[0][1] & kept[2][1]
    assert kept[1][1] == kept[3][1]


@pytest.mark.usefixtures("mlps")
def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnlab.lab.studies.whitening.RATES", (0.1,))
    results = STUDY.measure(make_experiment(steps=6))
    for row in results["accuracy"]:
        of_arm = numbers(where(results["cost"], arm=row["arm"]), "milliseconds")
        assert number(row, "seconds") == pytest.approx(number(row, "step") * sum(of_arm) / len(of_arm) / 1000)
    conclusion = conclude(results)
    draw(conclusion)
