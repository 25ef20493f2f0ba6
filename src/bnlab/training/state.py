"""How far a training is: its counters, the metrics of its epochs, the best of them, and when patience runs out."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnlab.errors import DivergedError
from bnlab.recipe import Recipe
from bnlab.training.schedule import Plan, StepTimes
from bnlab.training.validate import ValidationResult

Row = dict[str, float | int | None]


class LossNotFiniteError(DivergedError):
    """The loss of step `step`, counted from 0, is NaN or infinite. `fit` adds where and at which learning rate."""

    def __init__(self, loss: float, step: int) -> None:
        super().__init__(f"the loss became {loss}", "check mean, std and the file in init")
        self.step = step


@dataclass(kw_only=True)
class TrainState:
    """How far a training is. All randomness follows from the seed and these numbers: no generator is saved."""

    epoch: int = 0  # the running epoch, counted from 0
    batch: int = 0  # finished batches of the running epoch
    step: int = 0  # finished optimiser steps of the training
    size: int = 0  # side of the photos in the running epoch, in pixels; valid once the epoch has begun
    loss: float = 0.0  # sum of the losses over the photos of the running epoch
    num_correct: int = 0  # photos of the running epoch that the main output classified correctly
    num_images: int = 0  # photos of the running epoch that were trained on
    seconds: float = 0.0  # time spent on training steps in the running epoch
    plan: Plan = field(default_factory=lambda: Plan(steps=0, batches=1))
    """how many steps the training has; 0 until it begins"""
    step_times: StepTimes = field(default_factory=lambda: StepTimes(steps={}, validation=0.0, last=0.0))
    """the speeds from which a training with a time budget is planned"""
    total_seconds: float = 0.0  # time spent on everything so far, validation included
    rows: list[Row] = field(default_factory=list)  # metrics of the finished epochs
    best: Row | None = None  # the row of the best epoch
    patience_from: int = 0  # number of epochs after which patience counts, if a resume made the training longer

    def begin_epoch(self) -> None:
        self.epoch += 1
        self.batch = self.num_correct = self.num_images = 0
        self.loss = self.seconds = 0.0


class MetricAccumulator:
    """Adds the losses and correct answers of steps to a TrainState.

    Reading a number from a GPU waits for all the work queued there, so numbers are read once every `read_every` steps.
    """

    def __init__(self, state: TrainState, read_every: int) -> None:
        self.state, self.read_every = state, read_every
        self._pending: list[tuple[Tensor, Tensor, int]] = []

    def add(self, loss: Tensor, num_correct: Tensor, num_images: int) -> None:
        """Record a finished step.

        Raises:
            LossNotFiniteError: a loss since the last reading is not finite.
        """
        self.state.step += 1
        self.state.batch += 1
        self._pending.append((loss, num_correct, num_images))
        if len(self._pending) >= self.read_every:
            self.read()

    def read(self) -> None:
        """Bring the sums of the state up to date, with the errors of `add`."""
        if not self._pending:
            return
        losses, correct, images = zip(*self._pending, strict=True)
        numbers = zip(torch.stack(losses).tolist(), torch.stack(correct).tolist(), images, strict=True)
        for step, (loss, num_correct, num_images) in enumerate(numbers, self.state.step - len(self._pending)):
            check_finite(loss, step)
            self.state.loss += loss * num_images
            self.state.num_correct += int(num_correct)
            self.state.num_images += num_images
        self._pending.clear()


def check_finite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise LossNotFiniteError(loss, step)


def metrics_row(state: TrainState, recipe: Recipe) -> Row:
    """The metrics of the epoch that has just ended; those of the validation are None until `record_validation`."""
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "size": state.size,
        "learning_rate": state.plan.learning_rate(recipe, state.step - 1),
        "train_loss": state.loss / state.num_images,
        "train_top1": state.num_correct / state.num_images,
        **dict.fromkeys(("val_loss", "val_top1", "running_top1", "recalibration_seconds")),
        "images_per_second": state.num_images / max(state.seconds, 1e-9),
        "seconds": state.total_seconds,
    }


def record_validation(state: TrainState, row: Row, validation: ValidationResult) -> bool:
    """Write a validation into the row of its epoch. True if the epoch is the best by val accuracy, then by val loss."""
    evaluation = validation.evaluation
    row |= {"val_loss": evaluation.loss, "val_top1": evaluation.top1, "recalibration_seconds": validation.seconds}
    row["running_top1"] = validation.running.top1 if validation.running else None
    best = state.best
    if best is None or (evaluation.top1, -evaluation.loss) > (best["val_top1"], -(best["val_loss"] or 0.0)):
        state.best = row
        return True
    return False


def out_of_patience(state: TrainState, recipe: Recipe) -> bool:
    """Whether the latest validation came `patience` epochs or more after the best one."""
    validated = validated_epochs(state)
    if not recipe.patience or state.best is None or not validated:
        return False
    return validated[-1] - max(int(state.best["epoch"] or 0), state.patience_from) >= recipe.patience


def validated_epochs(state: TrainState) -> list[int]:
    """The epochs after which the network was validated, counted from 1."""
    return [int(row["epoch"] or 0) for row in state.rows if row["val_top1"] is not None]


def describe(row: Row, epochs: int, is_best: bool) -> str:
    """The metrics of an epoch as a line of text."""
    val = ""
    if row["val_top1"] is not None:
        val = f"val {row['val_top1']:.1%} (loss {row['val_loss']:.3f})  "
        if row["running_top1"] is not None:
            val += f"by running statistics {row['running_top1']:.1%} "
            val += f"(recalibration {row['recalibration_seconds']:.1f} s)  "
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"loss {row['train_loss']:.3f}  train {row['train_top1']:.1%}  {val}{row['images_per_second']:.0f} images/s"
        + ("  best so far" if is_best else "")
    )
