"""The one training loop."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, takewhile
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from bnlab.data.loader import TrainingLoader
from bnlab.data.preprocess import Pixels, Preprocessing, normalise
from bnlab.errors import DivergedError, Interrupted
from bnlab.nets.network import TableNetwork
from bnlab.norm import save_memory
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.checkpoint import Row, TrainState
from bnlab.training.ema import EMA
from bnlab.training.interrupt import listening
from bnlab.training.mixup import Targets, mixed
from bnlab.training.optimizer import set_learning_rate
from bnlab.training.validate import ValidationResult

_LOOK_EVERY = 50  # steps between two looks at the losses on a GPU, which has to be waited for to have one


@dataclass(frozen=True, kw_only=True)
class TrainingContext:
    """What is trained, on what, and how."""

    network: TableNetwork
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    loader: TrainingLoader
    recipe: Recipe
    preprocessing: Preprocessing
    device: str
    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    """the network, or what torch.compile made of it"""


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the loop hands on: it trains, others judge, keep and keep time."""

    judge: Callable[[], ValidationResult]
    """evaluate the network on val as it is now"""
    save: Callable[[TrainState], None]
    """keep what a resume needs; the position's plan may be shortened before"""
    epoch_done: Callable[[TrainState, Row, bool], None]
    """an epoch has ended: where the training stands, its metrics, and whether it is the best so far"""
    watched: Callable[[int], AbstractContextManager[object]] = nullcontext
    """around the step with this number"""


def fit(context: TrainingContext, state: TrainState, hooks: Callbacks, *, progress: Progress) -> None:
    """Train from `state` to the plan's last step, or until validation has not improved for `patience` epochs.

    Raises:
        DivergedError: the loss became NaN or infinite; the weights are those before that step, or, on a GPU, from up to
            50 steps later.
        Interrupted: Ctrl-C; what a resume needs was saved.
        PhotoError: a photo can no longer be read.
    """
    recipe, loader = context.recipe, context.loader
    saved = started = time.monotonic()
    offset, photos = state.total_seconds, len(loader.paths)
    accumulator = MetricAccumulator(state, look_every=1 if context.device == "cpu" else _LOOK_EVERY)
    total = round(state.plan.steps / loader.batches * photos)
    bar = progress.task("training", total, "images", done=state.epoch * photos + state.seen)
    with listening() as stop, bar as task:
        while state.epoch < state.plan.epochs and not out_of_patience(state, recipe):
            context.network.train()
            began = time.monotonic()
            if not state.batch:  # within an epoch it stays, also where the plan was shortened since
                state.size = state.plan.size(recipe, state.epoch)
            batches = loader.epoch(state.epoch, state.size, state.batch)
            for pixels, labels in takewhile(lambda _: state.step < state.plan.steps, batches):
                set_learning_rate(context.optimizer, state.plan.learning_rate(recipe, state.step))
                with _divergence(state, recipe), hooks.watched(state.step):
                    accumulator.add(*train_step(context, pixels, labels, state.step), len(labels))

                now = time.monotonic()
                state.seconds += now - began  # the wait for photos counted in
                state.training_seconds += now - began
                state.planned_seconds += state.step_times.steps.get(state.size, 0.0)
                state.total_seconds = offset + now - started
                task.advance(len(labels), epoch=state.epoch + 1, loss=state.loss / max(state.seen, 1))
                if stop.asked or now - saved >= recipe.checkpoint_seconds:
                    with _divergence(state, recipe):
                        accumulator.look()
                    hooks.save(state)
                    saved = time.monotonic()
                    if stop.asked:
                        raise Interrupted(f"interrupted after step {state.step}")
                began = time.monotonic()

            with _divergence(state, recipe):
                accumulator.look()
                row = metrics_row(state, recipe)
                is_best = state.plan.validates(recipe, state.epoch) and record_validation(state, row, hooks.judge())
            state.total_seconds = row["seconds"] = offset + time.monotonic() - started
            state.rows.append(row)
            state.begin_epoch()
            hooks.epoch_done(state, row, is_best)
            hooks.save(state)
            saved = time.monotonic()
            if stop.asked:
                raise Interrupted(f"interrupted after epoch {state.epoch}")


def train_step(context: TrainingContext, pixels: Pixels, labels: NDArray[Any], step: int) -> tuple[Tensor, Tensor]:
    """One optimiser step on a batch, uint8 N x H x W x 3; its mean loss and how many answers were right.

    Raises:
        FloatingPointError: on a CPU, the loss is no finite number; nothing was changed.
    """
    recipe, device = context.recipe, context.device
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout follows from seed and step
    classes = to_device(labels, device)  # N
    images = normalise(to_device(pixels, device), context.preprocessing)  # N x 3 x H x W
    images, targets = mixed(images, classes, recipe, step)

    half = recipe.precision == "bfloat16"
    with save_memory(), torch.autocast(device, torch.bfloat16, enabled=half):  # docs/norm.md: the same bits, less of it
        outputs = context.forward(images)  # N x classes, or a tuple of them: main, auxiliary ...
        loss = total_loss(outputs, targets, recipe)
    if device == "cpu":
        check_finite(loss.item(), step)
    loss.backward()  # type: ignore[no-untyped-call]
    context.optimizer.step()
    context.optimizer.zero_grad(set_to_none=True)  # here, so that the next forward has their memory
    if context.ema:
        context.ema.update(context.network, step + 1)

    main = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.detach(), (main.detach().argmax(1) == classes).sum()


def to_device(values: NDArray[Any], device: str) -> Tensor:
    """The array as a tensor on the device; to a GPU from pinned memory, without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor.to(device)


class MetricAccumulator:
    """Adds the steps' losses and right answers to a position; on a GPU, which a look would wait for, now and then."""

    def __init__(self, state: TrainState, look_every: int) -> None:
        self.state, self.look_every = state, look_every
        self.pending: list[tuple[Tensor, Tensor, int]] = []

    def add(self, loss: Tensor, right: Tensor, photos: int) -> None:
        """A step is done, on so many photos.

        Raises:
            FloatingPointError: one of the losses since the last look was no finite number.
        """
        self.state.step += 1
        self.state.batch += 1
        self.pending.append((loss, right, photos))
        if len(self.pending) >= self.look_every:
            self.look()

    def look(self) -> None:
        """Bring the position's sums up to date, with the errors of `add`."""
        if not self.pending:
            return
        losses = torch.stack([loss for loss, _, _ in self.pending]).tolist()
        rights = torch.stack([right for _, right, _ in self.pending]).tolist()
        first = self.state.step - len(self.pending)
        for step, loss, right, (_, _, photos) in zip(count(first), losses, rights, self.pending, strict=False):
            check_finite(loss, step)
            self.state.loss += loss * photos
            self.state.right += int(right)
            self.state.seen += photos
        self.pending.clear()


def check_finite(loss: float, step: int) -> None:
    """Raise FloatingPointError, with what happened and the step, unless a step's loss is a number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss}", step)


@contextmanager
def _divergence(state: TrainState, recipe: Recipe) -> Iterator[None]:
    """Say of numbers that are none where the training stood and what to try."""
    try:
        yield
    except (FloatingPointError, DivergedError) as error:
        what, step = (error.problem, state.step - 1) if isinstance(error, DivergedError) else error.args
        rate = state.plan.learning_rate(recipe, step)
        or_else = "" if recipe.init else ", or a network with batch normalisation"
        raise DivergedError(
            f"{what} at step {step + 1} (epoch {state.epoch + 1}), at a learning rate of {rate:.3g}",
            f"try --learning-rate at a third of it{or_else}",
        ) from None


def total_loss(outputs: Tensor | tuple[Tensor, ...], targets: Targets, recipe: Recipe) -> Tensor:
    """Cross-entropy of the main output, plus `auxiliary_weight` times that of each auxiliary one."""
    main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = targets.loss(main, recipe.label_smoothing)
    for output in auxiliary:
        loss = loss + recipe.auxiliary_weight * targets.loss(output, recipe.label_smoothing)
    return loss


def metrics_row(state: TrainState, recipe: Recipe) -> Row:
    """The metrics of the epoch that has just ended; what a judgement gives is None still."""
    return {
        "epoch": state.epoch + 1,
        "step": state.step,
        "size": state.size,
        "learning_rate": state.plan.learning_rate(recipe, state.step - 1),
        "train_loss": state.loss / state.seen,
        "train_top1": state.right / state.seen,
        "val_loss": None,
        "val_top1": None,
        "running_top1": None,
        "recalibration_seconds": None,
        "images_per_second": state.seen / max(state.seconds, 1e-9),
        "seconds": state.total_seconds,
    }


def record_validation(state: TrainState, row: Row, validation: ValidationResult) -> bool:
    """Write a judgement into the epoch's row, and say whether it is the best (by val accuracy, ties by loss)."""
    evaluation = validation.evaluation
    row |= {"val_loss": evaluation.loss, "val_top1": evaluation.top1, "running_top1": validation.running_top1}
    row["recalibration_seconds"] = validation.seconds
    best = state.best
    if best is None or (evaluation.top1, -evaluation.loss) > (best["val_top1"], -(best["val_loss"] or 0.0)):
        state.best = row
        return True
    return False


def out_of_patience(state: TrainState, recipe: Recipe) -> bool:
    """Whether the network was judged last, and found no better, `patience` epochs after the best or later."""
    validate = [int(row["epoch"] or 0) for row in state.rows if row["val_top1"] is not None]
    if not recipe.patience or state.best is None or not validate:
        return False
    return validate[-1] - int(state.best["epoch"] or 0) >= recipe.patience
