from collections.abc import Callable

import pytest

from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, where
from bnlab.lab.studies.inference_statistics import study as inference_statistics
from bnlab.lab.studies.inference_statistics.ema_statistics import AVERAGES, BATCH, POPULATION, counts
from bnlab.lab.studies.inference_statistics.study import conclude, train_probed
from bnlab.lab.verdict import Verdict
from tests.lab.studies.helpers import MakeExperiment, draw, has_no_number

SEEDS = range(4)
STEPS = (5, 20, 50)
KINDS = (*AVERAGES.values(), "average 0.1, corrected", "average 0.01, corrected", BATCH)


def results(
    behind: tuple[float, float, float] = (0.3, 0.1, 0.0), fewer: float = 0.0, noise: float = 0.0, photos: int = 4096
) -> Results:
    """Averages that are so much behind population at each step; few photos that are so much behind all."""
    probes, images = [], []
    for seed in SEEDS:
        wobble = noise * (-1) ** seed
        for step, less in zip(STEPS, behind, strict=True):
            row = {"seed": seed, "step": step, "n_test": 1000}
            probes.append({**row, "statistics": POPULATION, "top1": 0.9})
            probes += [{**row, "statistics": kind, "top1": 0.9 - less - wobble} for kind in KINDS]
        for n in (8, 512, 1024, 2048, photos):
            loss = 0.0 if n == photos else -fewer
            row = {"seed": seed, "images": n, "of": photos, "mean_off": 1 / n, "variance_off": 1 / n}
            images.append({**row, "against_all": loss, "top1": 0.9 + loss, "n_test": 1000})
    accuracy = [{"arm": "one", "seed": seed, "test_top1": 0.9, "guess": 0.1} for seed in SEEDS]
    return {"accuracy": accuracy, "probes": probes, "images": images}  # type: ignore[dict-item]


def verdicts(found: Results) -> list[Verdict]:
    return [each.verdict for each in conclude(found).evidence if each.primary]


def test_averages_that_are_behind_on_the_way_and_level_at_the_end() -> None:
    conclusion = conclude(results())
    assert conclusion.verdict is Verdict.HOLDS
    assert [round(each.mean, 6) for each in conclusion.evidence if each.primary] == [0, 20, 0, 20, 0]
    assert "1024 photos" in conclusion.evidence[-1].what


def test_averages_that_are_better_at_one_step() -> None:
    assert verdicts(results((0.3, -0.05, 0.0)))[0] is Verdict.DOES_NOT_HOLD


def test_where_population_is_ahead_at_every_step_it_is_behind_by_nothing() -> None:
    worst = conclude(results((0.3, 0.2, 0.1), noise=0.05)).evidence[0]
    assert worst.values == [0.0] * 4
    assert worst.verdict is Verdict.HOLDS


def test_averages_that_are_better_on_the_way() -> None:
    holds, does_not = Verdict.HOLDS, Verdict.DOES_NOT_HOLD
    assert verdicts(results((-0.005, 0.0, 0.0))) == [holds, does_not, holds, does_not, holds]


def test_few_photos_that_lose_two_points() -> None:
    assert verdicts(results(fewer=0.02))[-1] is Verdict.DOES_NOT_HOLD


def test_noise_shows_nothing() -> None:
    assert conclude(results((0.01, 0.01, 0.0), noise=0.03)).verdict is Verdict.NOT_SHOWN


def test_where_train_is_small_its_half_is_tried() -> None:
    conclusion = conclude(results(photos=1500))
    assert "statistics of 512 photos" in conclusion.evidence[-1].what
    assert any("512" in remark for remark in conclusion.remarks)


def test_a_seed_that_learnt_nothing_shows_nothing() -> None:
    found = results()
    found["accuracy"][1]["test_top1"] = 0.15
    found["images"] = [row | {"against_all": None} if row["seed"] == 1 else row for row in found["images"]]
    conclusion = conclude(found)
    for evidence in conclusion.evidence:
        assert has_no_number(evidence) == [False, True, False, False]
    assert conclusion.verdict is Verdict.NOT_SHOWN
    assert [remark[:6] for remark in conclusion.remarks] == ["seed 1"]
    draw(conclusion)


def test_pairs_are_of_one_step_and_ends_of_one_seed() -> None:
    found = results()
    late = [row | {"step": 60, "top1": 0.5} for row in where(found["probes"], seed=0, step=50)]  # a longer training
    usual = {"seed": 1, "step": 5, "statistics": "average 0.1"}
    found["probes"] = [row for row in found["probes"] if not usual.items() <= row.items()] + late
    conclusion = conclude(found)
    assert has_no_number(conclusion.evidence[0]) == [False, True, False, False]
    assert conclusion.numbers["test accuracy at the end, population, %"] == pytest.approx((50 + 3 * 90) / 4)


def test_one_probe_has_no_way_to_it() -> None:
    found = results()
    found["probes"] = where(found["probes"], step=50)
    assert all(has_no_number(conclude(found).evidence[1]))


@pytest.mark.parametrize("photos", [8, 9])
def test_hardly_any_photos(photos: int) -> None:
    found = results()
    row = {**where(found["images"], images=8)[0], "of": photos}
    found["images"] = [row | {"seed": seed, "images": n} for seed in SEEDS for n in counts(photos)]
    conclusion = conclude(found)
    assert len(conclusion.evidence[-1].values) == (0 if photos == 8 else 4)  # all against all says nothing
    assert "statistics of 8 photos" in conclusion.evidence[-1].what
    draw(conclusion)


@pytest.fixture
def job(make_experiment: MakeExperiment) -> Callable[[str], JobContext]:
    experiment = make_experiment()
    return lambda name: JobContext(
        split=experiment.splits.for_seed(0), folder=experiment.folder / name, device="cpu", seed=0
    )


def test_a_training_that_diverges_is_guessing_from_there_on(
    make_experiment: MakeExperiment, job: Callable[[str], JobContext]
) -> None:
    recipe = make_experiment(size=16).recipe("bn_mlp", validate_every=100)
    recipe = recipe.model_copy(update={"norm_momentum": 1.0, "learning_rate": 1e30, "schedule": "constant"})
    found = train_probed(job("a"), recipe, [1, 4])
    guess = found["accuracy"][-1]["guess"]
    assert [row["top1"] for row in where(found["probes"], statistics=POPULATION)][-2:] == [guess] * 2
    assert {(row["top1"], row["against_all"]) for row in found["images"]} == {(guess, None)}
    assert [row["images"] for row in found["images"]] == counts(int(found["images"][0]["of"] or 0))


@pytest.mark.slow
def test_from_photos_to_plots(make_experiment: MakeExperiment) -> None:
    found = inference_statistics.measure(make_experiment(size=16, seeds=1))
    assert [row["step"] for row in where(found["probes"], seed=0, statistics=BATCH)] == [5, 6]
    assert {row["statistics"] for row in found["probes"]} == {*KINDS, POPULATION}
    images = where(found["images"], seed=0)
    assert [row["images"] for row in images][:2] == [8, 16]
    assert images[-1]["images"] == images[-1]["of"]
    assert images[-1]["mean_off"] == images[-1]["against_all"] == 0
    draw(conclude(found))
