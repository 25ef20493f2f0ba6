"""The training loop: `fit` runs it and `train_step` is one optimiser step, with its loss."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from bnlab.data.preprocess import Pixels, normalise
from bnlab.errors import DivergedError, Interrupted
from bnlab.nets.blocks import is_normalised
from bnlab.norm import accumulate, save_memory
from bnlab.progress import Progress
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext
from bnlab.training.mixup import Targets, mix
from bnlab.training.optimizer import clip_gradients, set_learning_rate
from bnlab.training.schedule import Plan
from bnlab.training.state import (
    LossNotFiniteError,
    MetricAccumulator,
    Row,
    TrainState,
    check_finite,
    metrics_row,
    out_of_patience,
    record_validation,
)
from bnlab.training.validate import ValidationResult

_READ_EVERY = 50  # steps between readings of the losses on a GPU


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """What the loop leaves to its caller."""

    validate: Callable[[], ValidationResult]
    """evaluates the network on val as it is now"""
    save: Callable[[TrainState], None]
    """saves a checkpoint"""
    epoch_done: Callable[[TrainState, Row, ValidationResult | None, bool], None]
    """called after each epoch with its metrics, its validation if it had one, and whether it is the best so far"""
    around_step: Callable[[int], AbstractContextManager[object]] = nullcontext
    """entered with the step's number before each step, left after it"""
    replanned: Callable[[TrainState], Plan] = lambda state: state.plan
    """called before each step; gives the plan from that step on, which has this step at least"""


def fit(context: TrainingContext, state: TrainState, callbacks: Callbacks, *, progress: Progress) -> None:
    """Train from `state` to the last step of its plan, or until validation has not improved for `patience` epochs.

    The first Ctrl-C or SIGTERM saves a checkpoint after the running step and ends the training.

    Raises:
        DivergedError: a loss is NaN or infinite. The weights are those before that step, or, on a GPU, those of up to
            50 steps later.
        Interrupted: Ctrl-C; a checkpoint was saved.
        PhotoError: a photo can no longer be read.
    """
    recipe, loader = context.recipe, context.loader
    saved = started = time.monotonic()
    offset, num_photos = state.total_seconds, len(loader.paths)
    metrics = MetricAccumulator(state, read_every=1 if context.device == "cpu" else _READ_EVERY)
    photos_per_step = num_photos / loader.batches
    parts = sum(1 for _ in batches_of_step(math.ceil(photos_per_step), recipe))
    total, done = round(state.plan.steps * photos_per_step), state.epoch * num_photos + state.num_images
    with (
        accumulate(context.network, parts),  # the running statistics move as with one batch a step
        stop_requests() as stop,
        progress.task("training", total, "images", done=done) as task,
        _divergence_remedy(state, context),
    ):
        while state.epoch < state.plan.epochs and not out_of_patience(state, recipe):
            context.network.train()
            began = time.monotonic()
            for pixels, labels in _planned_batches(context, state, callbacks.replanned):
                set_learning_rate(context.optimizer, state.plan.learning_rate(recipe, state.step))
                with callbacks.around_step(state.step):
                    metrics.add(*train_step(context, pixels, labels, state.step), len(labels))

                now = time.monotonic()
                state.seconds += now - began  # includes the wait for photos
                state.total_seconds = offset + now - started
                total, loss = round(state.plan.steps * photos_per_step), state.loss / max(state.num_images, 1)
                task.advance(len(labels), total=total, epoch=state.epoch + 1, loss=loss)
                if stop.is_set() or now - saved >= recipe.checkpoint_seconds:
                    metrics.read()
                    callbacks.save(state)
                    saved = time.monotonic()
                    if stop.is_set():
                        raise Interrupted(f"interrupted after step {state.step}")
                began = time.monotonic()

            metrics.read()
            state.seconds += time.monotonic() - began  # a GPU has finished its steps now
            row = metrics_row(state, recipe)
            validation = callbacks.validate() if state.plan.validates(state.epoch) else None
            is_best = validation is not None and record_validation(state, row, validation)
            state.total_seconds = row["seconds"] = offset + time.monotonic() - started
            state.rows.append(row)
            state.begin_epoch()
            callbacks.epoch_done(state, row, validation, is_best)
            callbacks.save(state)
            saved = time.monotonic()
            if stop.is_set():
                raise Interrupted(f"interrupted after epoch {state.epoch}")


def _planned_batches(
    context: TrainingContext, state: TrainState, replanned: Callable[[TrainState], Plan]
) -> Iterator[tuple[Pixels, NDArray[Any]]]:
    """The batches of the rest of the epoch, as far as the plan goes. Before each, the plan may change.

    If the plan then wants larger photos in this epoch, because it ends earlier, the following batches have them.
    """
    batches: Iterator[tuple[Pixels, NDArray[Any]]] = iter(())
    opened = 0  # the size of their photos
    while state.step < state.plan.steps and state.batch < context.loader.batches:
        state.plan = replanned(state)
        size = state.plan.size(context.recipe, state.epoch)
        state.size = max(size, state.size) if state.batch else size
        if state.size != opened:
            batches, opened = context.loader.epoch(state.epoch, state.size, state.batch), state.size
        yield next(batches)


def train_step(context: TrainingContext, pixels: Pixels, labels: NDArray[Any], step: int) -> tuple[Tensor, Tensor]:
    """Make one optimiser step on uint8 pixels N x H x W x 3, in `accumulate` batches whose gradients are added.

    Returns:
        The mean loss before the step, and how many photos the main output classified correctly.

    Raises:
        LossNotFiniteError: on a CPU, the loss is NaN or infinite; no weight was changed.
    """
    recipe, device = context.recipe, context.device
    losses, correct = [], []
    seed_step(recipe, step)
    for part in batches_of_step(len(labels), recipe):
        images, targets = training_batch(context, pixels[part], labels[part], step)  # n x 3 x H x W
        half = recipe.precision == "bfloat16"
        with (
            save_memory(),
            torch.autocast(device, torch.bfloat16, enabled=half),
        ):  # docs/norm.md: same bits, less memory
            outputs = context.forward(images)  # n x classes, or a tuple of these: main, auxiliary ...
            loss = loss_of(outputs, targets, recipe) * (len(images) / len(labels))
        if device == "cpu":
            check_finite(loss.item(), step)
        loss.backward()  # type: ignore[no-untyped-call]
        main = outputs[0] if isinstance(outputs, tuple) else outputs
        losses.append(loss.detach())
        correct.append((main.detach().argmax(1) == targets.main).sum())
    if recipe.clip_norm:
        clip_gradients(context.optimizer, recipe.clip_norm)
    context.optimizer.step()
    context.optimizer.zero_grad(set_to_none=True)  # here, so that the next forward can use their memory
    if context.ema:
        context.ema.update(context.network, step + 1)
    return torch.stack(losses).sum(), torch.stack(correct).sum()


def batches_of_step(photos: int, recipe: Recipe) -> Iterator[slice]:
    """The batches of a step as slices of its photos; their sizes differ by at most one, and none has a single photo."""
    number = max(1, min(recipe.accumulate, photos // 2))
    edges = [photos * i // number for i in range(number + 1)]
    return map(slice, edges[:-1], edges[1:])


def loss_of(outputs: Tensor | tuple[Tensor, ...], targets: Targets, recipe: Recipe) -> Tensor:
    """Mean cross-entropy in nats of the main output, plus `auxiliary_weight` times that of each auxiliary output.

    Where pairs of photos were mixed, it is the mean over the two classes, weighted as in the mix.
    """
    total: Tensor | None = None
    for logits in outputs if isinstance(outputs, tuple) else (outputs,):  # N x classes
        loss = F.cross_entropy(logits, targets.main, label_smoothing=recipe.label_smoothing)
        if targets.other is not None:
            other = F.cross_entropy(logits, targets.other, label_smoothing=recipe.label_smoothing)
            loss = targets.weight * loss + (1 - targets.weight) * other
        total = loss if total is None else total + recipe.auxiliary_weight * loss
    assert total is not None
    return total


def training_batch(context: TrainingContext, pixels: Pixels, labels: NDArray[Any], step: int) -> tuple[Tensor, Targets]:
    """The images, N x 3 x H x W, and targets of a step, from a batch of the loader, uint8 N x H x W x 3."""
    images = normalise(to_device(pixels, context.device), context.preprocessing)
    return mix(images, to_device(labels, context.device), context.recipe, step)


def seed_step(recipe: Recipe, step: int) -> None:
    """Seed torch's generators for a step, so that what dropout drops follows from seed and step alone."""
    torch.manual_seed(recipe.seed * 1_000_003 + step)


def to_device(values: NDArray[Any], device: str) -> Tensor:
    """The array as a tensor on the device; the copy to a GPU is asynchronous, from pinned memory."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device == "cuda" else tensor.to(device)


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """Use kernels whose results repeat; afterwards, restore torch's choice of kernels and its generators."""
    cuda = [torch.cuda.current_device()] if device == "cuda" else []
    with (
        torch.random.fork_rng(devices=cuda),
        torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True),
    ):
        yield


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Give an event that the first Ctrl-C or SIGTERM sets in place of ending the process.

    The second one has its usual effect. Outside the main thread, where Python delivers no signals, nothing sets it; nor
    does a signal whose handler was installed from C, which Python could not restore.
    """
    stop = threading.Event()
    with ExitStack() as handlers:

        def record(number: int, frame: FrameType | None) -> None:
            stop.set()
            handlers.close()  # restores the handlers before

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.getsignal(number)
                if before is not None:  # None: installed from C
                    handlers.callback(signal.signal, number, before)
                    signal.signal(number, record)
        yield stop


@contextmanager
def _divergence_remedy(state: TrainState, context: TrainingContext) -> Iterator[None]:
    """Add to a divergence where it happened and what to try. The weights of step 1 are not the fault of a rate."""
    try:
        yield
    except DivergedError as error:
        step = error.step if isinstance(error, LossNotFiniteError) else state.step - 1
        highest, rate = context.recipe.learning_rate, state.plan.learning_rate(context.recipe, step)
        remedy = f"try learning_rate={highest / 3:.2g}"
        if not (is_normalised(context.network) or context.recipe.init):
            remedy += ", or a network with batch normalisation"
        raise DivergedError(
            f"{error.problem} at step {step + 1} (epoch {state.epoch + 1}), at a learning rate of {rate:.3g}",
            error.remedy if isinstance(error, LossNotFiniteError) and not step else remedy,
        ) from None
