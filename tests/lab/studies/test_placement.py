from dataclasses import replace

import pytest

from bnlab.lab.records import Records, Results
from bnlab.lab.studies import placement
from bnlab.lab.studies.placement import AFTER, BEFORE, arm, conclude
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw

SEEDS = range(4)


def results(gains: dict[str, float], noise: float = 0.001) -> Results:
    """Networks that gain so much by being normalised before; at the rate not chosen it is the other way round."""
    rows: Records = []
    for network, gain in gains.items():
        for place in (BEFORE, AFTER):
            for rate, chosen in ((0.1, 1), (0.3, 0)):
                for seed in SEEDS:
                    top1 = 0.8 + (gain if (place == BEFORE) == bool(chosen) else 0) + noise * (-1) ** seed * len(place)
                    labels = {"arm": arm(network, place), "learning_rate": rate, "chosen": chosen, "seed": seed}
                    rows.append({**labels, "val_top1": 0.5, "test_top1": top1, "n_test": 1000, "diverged_at": None})
    return {"accuracy": rows}


@pytest.mark.parametrize(
    ("gains", "noise", "verdict"),
    [
        ({"A": 0.05, "B": 0.02}, 0.001, Verdict.HOLDS),
        ({"A": 0.05, "B": -0.02}, 0.001, Verdict.DOES_NOT_HOLD),
        ({"A": 0.05, "B": 0.0}, 0.001, Verdict.NOT_SHOWN),
        ({"A": 0.05, "B": 0.02}, 0.05, Verdict.NOT_SHOWN),
    ],
)
def test_one_network_that_gains_nothing_is_enough(gains: dict[str, float], noise: float, verdict: Verdict) -> None:
    conclusion = conclude(results(gains, noise))
    assert conclusion.verdict is verdict
    assert [each.mean for each in conclusion.evidence] == pytest.approx([100 * gain for gain in gains.values()])


@pytest.mark.parametrize(("gain", "verdict"), [(0.02, Verdict.HOLDS), (-0.025, Verdict.DOES_NOT_HOLD)])
def test_the_number_of_networks_is_allowed_for_once(gain: float, verdict: Verdict) -> None:
    """The gain of B is clear at 95%, or its loss at 97.5%, and neither at a level that is corrected again."""
    conclusion = conclude(results({"A": 0.05, "B": gain}, 0.01))
    assert conclusion.verdict is verdict
    weak = conclusion.evidence[1]
    assert replace(weak, level=0.975 if gain > 0 else 0.9875).verdict is Verdict.NOT_SHOWN


def test_the_intervals_drawn_are_those_that_decide() -> None:
    conclusion = conclude(results({"A": 0.05}, 0.01))
    wider = conclusion.with_overlap(0.5)
    low, high = wider.evidence[0].interval
    assert low < conclusion.evidence[0].interval[0]
    assert (wider.plots["differences"].series[0].low, wider.plots["differences"].series[0].high) == ((low,), (high,))


def test_one_seed_draws_no_interval() -> None:
    rows = [row for row in results({"A": 0.05})["accuracy"] if row["seed"] == 0]
    series = conclude({"accuracy": rows}).plots["differences"].series[0]
    assert series.low == series.high == series.y


def test_the_large_networks_have_stems_for_small_photos(make_experiment: MakeExperiment) -> None:
    large = placement._FULL["GoogLeNet"]
    assert placement._recipe(make_experiment(), *large).stem == "small"
    assert placement._recipe(make_experiment(size=128), *large).stem is None
    assert placement._recipe(make_experiment(), *placement._QUICK["small Inception"]).stem is None


def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "RATES", (0.1, 0.3))
    found = placement.measure(make_experiment(size=16, steps=1))
    assert len({row["arm"] for row in found["accuracy"]}) == 6
    assert len(found["accuracy"]) == 6 * 2 * 2  # arms, rates, seeds
    chosen_once = {(row["arm"], row["seed"]): row["chosen"] for row in found["accuracy"] if row["chosen"]}
    assert len(chosen_once) == 12
    conclusion = conclude(found)
    assert len(conclusion.evidence) == 3
    draw(conclusion)
