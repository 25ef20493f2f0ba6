from collections.abc import Callable

import pytest

from bnlab.errors import RecipeError
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results, where
from bnlab.recipe import Recipe

MakeExperiment = Callable[..., Experiment]


def planted(job: JobContext, recipe: Recipe, best: float) -> Results:
    """Val accuracy is highest at the rate `best` for seed 0 and at twice that for seed 1. Test contradicts it."""
    off = abs(recipe.learning_rate - best * (1 + job.seed)) / best
    row = {"step": recipe.steps, "val_top1": 1 / (1 + off), "test_top1": off / 10, "seed_seen": recipe.seed}
    return {"accuracy": [row | {"diverged_at": 3 if recipe.learning_rate > 0.35 else None}]}


def test_the_learning_rate_of_each_arm_and_seed_is_chosen_by_val(make_experiment: MakeExperiment) -> None:
    experiment = make_experiment()
    arms = {name: experiment.recipe(network) for name, network in experiment.network_pair().items()}
    results = experiment.run_learning_rates(arms, (0.1, 0.2, 0.4), planted, best=0.1)
    assert len(results["accuracy"]) == 12
    best = {(row["arm"], row["seed"]): row["learning_rate"] for row in chosen(results)}
    assert best == {(WITH_BN, 0): 0.1, (WITH_BN, 1): 0.2, (WITHOUT_BN, 0): 0.1, (WITHOUT_BN, 1): 0.2}
    assert all(row["seed_seen"] == row["seed"] for row in results["accuracy"])
    assert lr_remarks(results) == tuple(
        sentence
        for arm in (WITH_BN, WITHOUT_BN)
        for sentence in (
            f"{arm}: the best learning rate was the lowest tried (0.1) for 1 seed of 2; a better one may lie outside",
            f"{arm}: 2 trainings diverged, at learning rates of 0.4; one that does counts as guessing",
        )
    )


def test_measurements_are_arms_times_seeds_with_labels(make_experiment: MakeExperiment) -> None:
    experiment = make_experiment(seeds=3)
    recipe = experiment.recipe("bn_mlp", learning_rate=0.1)
    measurements = experiment.measurements({"a": recipe, "b": recipe}, planted, labels={"size": 8}, best=0.1)
    assert [each.labels for each in measurements] == [
        {"arm": arm, "size": 8, "seed": seed} for arm in "ab" for seed in range(3)
    ]
    assert {each.steps for each in measurements} == {6}
    rows = experiment.run(measurements)["accuracy"]
    assert [(row["arm"], row["seed"]) for row in rows] == [(arm, seed) for arm in "ab" for seed in range(3)]
    assert where(rows, arm="a", seed=2)[0]["val_top1"] == where(rows, arm="b", seed=2)[0]["val_top1"]
    assert experiment.seconds > 0


def test_the_users_keys_take_precedence_and_digits_are_not_flipped(make_experiment: MakeExperiment) -> None:
    experiment = make_experiment(size=48)
    for base in (None, "bn-x5"):
        recipe = experiment.recipe("bn_small_inception", base=base, steps=99, dropout=0.5)
        assert (recipe.size, recipe.steps, recipe.dropout, recipe.flip) == (48, 6, 0.5, 0.0)
        assert (recipe.precision, recipe.label_smoothing, recipe.start_size) == ("float32", 0.0, 1.0)
    assert experiment.recipe("bn_small_inception", base="bn-x5").weight_decay == 0.00004
    experiment.options = {"epochs": 3}
    assert (experiment.recipe("bn_mlp", steps=99).steps, experiment.recipe("bn_mlp", steps=99).epochs) == (0, 3)
    photos = make_experiment(kind="photos")
    assert photos.recipe("bn_small_inception").flip == 0.5
    with pytest.raises(RecipeError, match="a recipe has no key 'stpes'"):
        experiment.recipe("bn_mlp", stpes=3)


def test_values_and_networks_follow_the_budget(make_experiment: MakeExperiment) -> None:
    experiment = make_experiment(kind="photos")
    assert experiment.by_budget(1, 2) == 1
    assert experiment.network_pair()[WITH_BN] == "bn_small_inception"
    experiment.budget = "full"
    assert experiment.by_budget(1, 2) == 2
    assert experiment.network_pair() == {WITH_BN: "bn_googlenet", WITHOUT_BN: "googlenet"}
    experiment.splits.kind = "digits"
    assert experiment.network_pair()[WITH_BN] == "bn_small_inception"
