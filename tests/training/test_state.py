import math

import pytest
import torch

from bnlab.classifier.evaluate import Evaluation
from bnlab.recipe import Recipe
from bnlab.training.schedule import Plan
from bnlab.training.state import (
    LossNotFiniteError,
    MetricAccumulator,
    Row,
    TrainState,
    metrics_row,
    out_of_patience,
    record_validation,
)
from bnlab.training.validate import ValidationResult
from tests.classifier.test_evaluate import KNOWN, answers


def test_metrics_are_means_over_the_photos_of_the_epoch() -> None:
    plan = Plan(steps=40, batches=10)
    state = TrainState(epoch=2, step=30, size=96, plan=plan, num_images=20, loss=30.0, num_correct=5, seconds=2.0)
    row = metrics_row(state, Recipe())
    assert (row["epoch"], row["train_loss"], row["train_top1"], row["images_per_second"]) == (3, 1.5, 0.25, 10)
    assert (row["step"], row["size"], row["learning_rate"]) == (30, 96, plan.learning_rate(Recipe(), 29))
    assert [key for key, value in row.items() if value is None] == [
        "val_loss", "val_top1", "running_top1", "recalibration_seconds",
    ]  # fmt: skip


def test_the_best_epoch_has_the_highest_accuracy_and_among_equals_the_lowest_loss() -> None:
    state = TrainState(step=10, plan=Plan(steps=40, batches=10), num_images=20)
    running = answers([0, 1, 1, 1], [[1, 0, 0]] * 4)

    def is_best(evaluation: Evaluation) -> bool:
        validation = ValidationResult(evaluation=evaluation, running=running, seconds=1.5)
        return record_validation(state, metrics_row(state, Recipe()), validation)

    assert is_best(KNOWN)
    row = state.best
    assert row is not None
    assert (row["val_top1"], row["val_loss"]) == (KNOWN.top1, KNOWN.loss)
    assert (row["running_top1"], row["recalibration_seconds"]) == (0.25, 1.5)
    assert not is_best(KNOWN)
    surer = answers(KNOWN.targets.tolist(), [[0.9, 0.1, 0], [0.9, 0.1, 0], [0.2, 0.7, 0.1], [0, 1, 0], [0, 0.1, 0.9]])
    assert surer.top1 == KNOWN.top1
    assert is_best(surer)
    assert not is_best(answers([0, 1], [[0, 1, 0], [1, 0, 0]]))


def test_patience_counts_epochs_from_the_best_to_the_latest_validation() -> None:
    rows: list[Row] = [{"epoch": 3, "val_top1": 0.5}, {"epoch": 5, "val_top1": 0.4}, {"epoch": 6, "val_top1": None}]
    state = TrainState(epoch=6, best={"epoch": 3}, rows=rows)
    assert not out_of_patience(state, Recipe(patience=0))
    assert not out_of_patience(state, Recipe(patience=3))
    assert out_of_patience(state, Recipe(patience=2))
    assert not out_of_patience(TrainState(), Recipe(patience=1))


def test_on_a_gpu_losses_are_read_once_in_so_many_steps() -> None:
    state = TrainState()
    metrics = MetricAccumulator(state, read_every=3)
    for loss in (1.0, 2.0):
        metrics.add(torch.tensor(loss), torch.tensor(1), 4)
    assert (state.step, state.batch, state.num_images, state.loss) == (2, 2, 0, 0)
    metrics.add(torch.tensor(3.0), torch.tensor(2), 2)
    assert (state.step, state.num_images, state.loss, state.num_correct) == (3, 10, 18.0, 4)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_found_with_its_step(loss: float) -> None:
    metrics = MetricAccumulator(TrainState(step=7), read_every=3)
    metrics.add(torch.tensor(0.5), torch.tensor(0), 4)
    metrics.add(torch.tensor(loss), torch.tensor(0), 4)
    with pytest.raises(LossNotFiniteError, match=f"the loss became {loss}") as error:
        metrics.read()
    assert (error.value.exit_status, error.value.remedy) == (1, "check mean, std and the file in init")
    assert error.value.step == 8
