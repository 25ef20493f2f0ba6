import pytest

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN
from bnlab.lab.records import Records, Results
from bnlab.lab.studies.initialisation import RATES, STUDY, conclude
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw, has_no_number

SCALES = (0.0001, 0.001, 0.01, 0.1, 1.0, 10.0)


def row(network: str, scale: float, seed: int, top1: float, rate: float = 0.01, chosen: int = 1) -> Records:
    named = {"arm": f"{network}, {scale:g}", "network": network, "scale": scale, "seed": seed}
    result = {"learning_rate": rate, "chosen": chosen, "test_top1": top1, "step": 150, "diverged_at": None}
    return [{**named, **result, "guess": 0.1, "n_test": 500}]


def planted(with_bn: str, without: str, seeds: int = 3) -> Results:
    """For each scale a letter: o trains, x does not."""
    rows: Records = []
    for network, letters in ((WITH_BN, with_bn), (WITHOUT_BN, without)):
        for scale, letter in zip(SCALES, letters, strict=True):
            for seed in range(seeds):
                rows += row(network, scale, seed, 0.9 if letter == "o" else 0.1)
                rows += row(network, scale, seed, 1.0, rate=RATES[0], chosen=0)  # what was not chosen does not count
    return {"accuracy": rows}


@pytest.mark.parametrize(
    ("with_bn", "without", "verdict"),
    [
        ("oooooo", "xxxoox", Verdict.HOLDS),
        ("xxxoox", "oooooo", Verdict.DOES_NOT_HOLD),
        ("xxooox", "xxxoox", Verdict.NOT_SHOWN),  # one step of the grid is within its resolution
        ("xxxoox", "xxxoox", Verdict.NOT_SHOWN),
    ],
)
def test_verdict(with_bn: str, without: str, verdict: Verdict) -> None:
    assert conclude(planted(with_bn, without)).verdict == verdict


@pytest.mark.parametrize(("letters", "decades"), [("oooooo", 5), ("xxxoox", 2), ("xxxxxo", 0.5), ("oxxxxo", 1)])
def test_decades_run_to_halfway_between_scales(letters: str, decades: float) -> None:
    numbers = conclude(planted("oooooo", letters)).numbers
    assert numbers["decades that train, without BN, mean"] == pytest.approx(decades)


def test_halfway_is_from_guessing_to_the_best_of_both() -> None:
    tops = (0.1, 0.1, 0.1, 0.6, 0.1, 0.1)  # halfway to the 0.9 with BN is 0.5: a fifth of the way down on either side
    rows = [
        r for seed in range(2) for s, top1 in zip(SCALES, tops, strict=True) for r in row(WITHOUT_BN, s, seed, top1)
    ]
    conclusion = conclude({"accuracy": rows + planted("oooooo", "xxxxxx", 2)["accuracy"][: 4 * len(SCALES)]})
    assert conclusion.numbers["decades that train, without BN, mean"] == pytest.approx(0.4)


def test_a_seed_that_learnt_nothing_shows_nothing() -> None:
    results = planted("oooooo", "xxxoox")
    results["accuracy"] = [r | {"test_top1": 0.15} if r["seed"] == 1 else r for r in results["accuracy"]]
    conclusion = conclude(results)
    assert has_no_number(conclusion.evidence[0]) == [False, True, False]
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert conclusion.remarks[-1].startswith("seed 1: neither network learnt")


def test_a_seed_without_one_of_the_networks_shows_nothing() -> None:
    results = planted("oooooo", "xxxoox")
    gone = {"network": WITHOUT_BN, "seed": 0}
    results["accuracy"] = [r for r in results["accuracy"] if {key: r[key] for key in gone} != gone]
    conclusion = conclude(results)
    assert has_no_number(conclusion.evidence[0]) == [True, False, False]
    draw(conclusion)


def test_the_last_validation_counts_and_remarks_name_the_ends_of_the_rates() -> None:
    results = planted("oooooo", "xxxoox", 2)
    early = [{**r, "step": 50, "test_top1": 0.0} for r in results["accuracy"]]
    results["accuracy"] = early + results["accuracy"]
    lost = row(WITHOUT_BN, 10.0, 0, 0.1, rate=RATES[-1], chosen=0)[0] | {"diverged_at": 3}
    best = row(WITHOUT_BN, 10.0, 1, 0.1, rate=RATES[0])[0]
    conclusion = conclude({"accuracy": [*results["accuracy"], lost, best]})
    assert conclusion.numbers["decades that train, with BN, mean"] == 5
    assert conclusion.remarks == (
        "with BN: 0 trainings of 24 diverged",
        "without BN: 1 training of 25 diverged",
        "without BN: the best learning rate was the lowest tried (1e-06) at scales of 10",
    )


def test_from_photos_to_plots(make_experiment: MakeExperiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnlab.lab.studies.initialisation.RATES", (0.1,))
    results = STUDY.measure(make_experiment(steps=2, size=16))
    assert len(results["accuracy"]) == 2 * len(SCALES) * 2
    assert {row["scale"] for row in results["accuracy"]} == set(SCALES)
    conclusion = conclude(results)
    draw(conclusion)
