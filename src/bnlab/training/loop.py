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
from bnlab.data.pixels import Pixels, View, normalise
from bnlab.errors import DivergedError, Interrupted
from bnlab.nets.network import TableNetwork
from bnlab.norm import save_memory
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.average import Average
from bnlab.training.checkpoint import Position, Row
from bnlab.training.interrupt import listening
from bnlab.training.judge import Judgement
from bnlab.training.mixing import Targets, mixed
from bnlab.training.optimizer import set_learning_rate

_LOOK_EVERY = 50  # steps between two looks at the losses on a GPU, which has to be waited for to have one


@dataclass(frozen=True, kw_only=True)
class Trainee:
    """What is trained, on what, and how."""

    network: TableNetwork
    optimizer: torch.optim.Optimizer
    average: Average | None
    loader: TrainingLoader
    recipe: Recipe
    view: View
    device: str
    forward: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    """the network, or what torch.compile made of it"""


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop hands on: it trains, others judge, keep and keep time."""

    judge: Callable[[], Judgement]
    """evaluate the network on val as it is now"""
    save: Callable[[Position], None]
    """keep what a resume needs; the position's plan may be shortened before"""
    epoch_done: Callable[[Position, Row, bool], None]
    """an epoch has ended: where the training stands, its metrics, and whether it is the best so far"""
    watched: Callable[[int], AbstractContextManager[object]] = nullcontext
    """around the step with this number"""


def fit(trainee: Trainee, position: Position, hooks: Hooks, *, progress: Progress) -> None:
    """Train from `position` to the plan's last step, or until validation has not improved for `patience` epochs.

    Raises:
        DivergedError: the loss became NaN or infinite; the weights are those before that step, or, on a GPU, from up to
            50 steps later.
        Interrupted: Ctrl-C; what a resume needs was saved.
        PhotoError: a photo can no longer be read.
    """
    recipe, loader = trainee.recipe, trainee.loader
    saved = started = time.monotonic()
    offset, photos = position.total_seconds, len(loader.paths)
    tally = Tally(position, look_every=1 if trainee.device == "cpu" else _LOOK_EVERY)
    total = round(position.plan.steps / loader.batches * photos)
    bar = progress.task("training", total, "images", done=position.epoch * photos + position.seen)
    with listening() as stop, bar as task:
        while position.epoch < position.plan.epochs and not out_of_patience(position, recipe):
            trainee.network.train()
            began = time.monotonic()
            if not position.batch:  # within an epoch it stays, also where the plan was shortened since
                position.size = position.plan.size(recipe, position.epoch)
            batches = loader.epoch(position.epoch, position.size, position.batch)
            for pixels, labels in takewhile(lambda _: position.step < position.plan.steps, batches):
                set_learning_rate(trainee.optimizer, position.plan.learning_rate(recipe, position.step))
                with _divergence(position, recipe), hooks.watched(position.step):
                    tally.add(*train_step(trainee, pixels, labels, position.step), len(labels))

                now = time.monotonic()
                position.seconds += now - began  # the wait for photos counted in
                position.training_seconds += now - began
                position.planned_seconds += position.pace.steps.get(position.size, 0.0)
                position.total_seconds = offset + now - started
                task.advance(len(labels), epoch=position.epoch + 1, loss=position.loss / max(position.seen, 1))
                if stop.asked or now - saved >= recipe.checkpoint_seconds:
                    with _divergence(position, recipe):
                        tally.look()
                    hooks.save(position)
                    saved = time.monotonic()
                    if stop.asked:
                        raise Interrupted(f"interrupted after step {position.step}")
                began = time.monotonic()

            with _divergence(position, recipe):
                tally.look()
                row = row_of(position, recipe)
                is_best = position.plan.judges(recipe, position.epoch) and judge_epoch(position, row, hooks.judge())
            position.total_seconds = row["seconds"] = offset + time.monotonic() - started
            position.rows.append(row)
            position.begin_epoch()
            hooks.epoch_done(position, row, is_best)
            hooks.save(position)
            saved = time.monotonic()
            if stop.asked:
                raise Interrupted(f"interrupted after epoch {position.epoch}")


def train_step(trainee: Trainee, pixels: Pixels, labels: NDArray[Any], step: int) -> tuple[Tensor, Tensor]:
    """One optimiser step on a batch, uint8 N x H x W x 3; its mean loss and how many answers were right.

    Raises:
        FloatingPointError: on a CPU, the loss is no finite number; nothing was changed.
    """
    recipe, device = trainee.recipe, trainee.device
    torch.manual_seed(recipe.seed * 1_000_003 + step)  # dropout follows from seed and step
    classes = to_device(labels, device)  # N
    images = normalise(to_device(pixels, device), trainee.view)  # N x 3 x H x W
    images, targets = mixed(images, classes, recipe, step)

    half = recipe.precision == "bfloat16"
    with save_memory(), torch.autocast(device, torch.bfloat16, enabled=half):  # docs/norm.md: the same bits, less of it
        outputs = trainee.forward(images)  # N x classes, or a tuple of them: main, auxiliary ...
        loss = total_loss(outputs, targets, recipe)
    if device == "cpu":
        check_finite(loss.item(), step)
    loss.backward()  # type: ignore[no-untyped-call]
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)  # here, so that the next forward has their memory
    if trainee.average:
        trainee.average.update(trainee.network, step + 1)

    main = outputs[0] if isinstance(outputs, tuple) else outputs
    return loss.detach(), (main.detach().argmax(1) == classes).sum()


def to_device(values: NDArray[Any], device: str) -> Tensor:
    """The array as a tensor on the device; to a GPU from pinned memory, without waiting for it."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor.to(device)


class Tally:
    """Adds the steps' losses and right answers to a position; on a GPU, which a look would wait for, now and then."""

    def __init__(self, position: Position, look_every: int) -> None:
        self.position, self.look_every = position, look_every
        self.pending: list[tuple[Tensor, Tensor, int]] = []

    def add(self, loss: Tensor, right: Tensor, photos: int) -> None:
        """A step is done, on so many photos.

        Raises:
            FloatingPointError: one of the losses since the last look was no finite number.
        """
        self.position.step += 1
        self.position.batch += 1
        self.pending.append((loss, right, photos))
        if len(self.pending) >= self.look_every:
            self.look()

    def look(self) -> None:
        """Bring the position's sums up to date, with the errors of `add`."""
        if not self.pending:
            return
        losses = torch.stack([loss for loss, _, _ in self.pending]).tolist()
        rights = torch.stack([right for _, right, _ in self.pending]).tolist()
        first = self.position.step - len(self.pending)
        for step, loss, right, (_, _, photos) in zip(count(first), losses, rights, self.pending, strict=False):
            check_finite(loss, step)
            self.position.loss += loss * photos
            self.position.right += int(right)
            self.position.seen += photos
        self.pending.clear()


def check_finite(loss: float, step: int) -> None:
    """Raise FloatingPointError, with what happened and the step, unless a step's loss is a number."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss became {loss}", step)


@contextmanager
def _divergence(position: Position, recipe: Recipe) -> Iterator[None]:
    """Say of numbers that are none where the training stood and what to try."""
    try:
        yield
    except (FloatingPointError, DivergedError) as error:
        what, step = (error.problem, position.step - 1) if isinstance(error, DivergedError) else error.args
        rate = position.plan.learning_rate(recipe, step)
        or_else = "" if recipe.init else ", or a network with batch normalisation"
        raise DivergedError(
            f"{what} at step {step + 1} (epoch {position.epoch + 1}), at a learning rate of {rate:.3g}",
            f"try --learning-rate at a third of it{or_else}",
        ) from None


def total_loss(outputs: Tensor | tuple[Tensor, ...], targets: Targets, recipe: Recipe) -> Tensor:
    """Cross-entropy of the main output, plus `auxiliary_weight` times that of each auxiliary one."""
    main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = targets.loss(main, recipe.label_smoothing)
    for output in auxiliary:
        loss = loss + recipe.auxiliary_weight * targets.loss(output, recipe.label_smoothing)
    return loss


def row_of(position: Position, recipe: Recipe) -> Row:
    """The metrics of the epoch that has just ended; what a judgement gives is None still."""
    return {
        "epoch": position.epoch + 1,
        "step": position.step,
        "size": position.size,
        "learning_rate": position.plan.learning_rate(recipe, position.step - 1),
        "train_loss": position.loss / position.seen,
        "train_top1": position.right / position.seen,
        "val_loss": None,
        "val_top1": None,
        "running_top1": None,
        "recalibration_seconds": None,
        "images_per_second": position.seen / max(position.seconds, 1e-9),
        "seconds": position.total_seconds,
    }


def judge_epoch(position: Position, row: Row, judgement: Judgement) -> bool:
    """Write a judgement into the epoch's row, and say whether it is the best (by val accuracy, ties by loss)."""
    evaluation = judgement.evaluation
    row |= {"val_loss": evaluation.loss, "val_top1": evaluation.top1, "running_top1": judgement.running_top1}
    row["recalibration_seconds"] = judgement.seconds
    best = position.best
    if best is None or (evaluation.top1, -evaluation.loss) > (best["val_top1"], -(best["val_loss"] or 0.0)):
        position.best = row
        return True
    return False


def out_of_patience(position: Position, recipe: Recipe) -> bool:
    """Whether the network was judged last, and found no better, `patience` epochs after the best or later."""
    judged = [int(row["epoch"] or 0) for row in position.rows if row["val_top1"] is not None]
    if not recipe.patience or position.best is None or not judged:
        return False
    return judged[-1] - int(position.best["epoch"] or 0) >= recipe.patience
