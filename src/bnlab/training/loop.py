"""The one training loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.classifier.evaluate import Evaluation
from bnlab.config import Recipe
from bnlab.data.loader import TrainingLoader
from bnlab.data.pixels import View, normalise
from bnlab.errors import DivergedError, Interrupted
from bnlab.nets.network import TableNetwork
from bnlab.norm import save_memory
from bnlab.progress import Progress
from bnlab.training.checkpoint import Position, Row
from bnlab.training.interrupt import listening
from bnlab.training.schedule import learning_rate


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """What the loop hands on: it trains, others judge and keep."""

    judge: Callable[[], Evaluation]
    """evaluate the network on val as it is now"""
    save: Callable[[Position], None]
    """keep what a resume needs"""
    epoch_done: Callable[[Position, Row, bool], None]
    """an epoch has ended: where the training stands, its metrics, and whether it is the best so far"""


def fit(
    network: TableNetwork,
    optimizer: torch.optim.Optimizer,
    loader: TrainingLoader,
    recipe: Recipe,
    view: View,
    position: Position,
    hooks: Hooks,
    *,
    device: str,
    progress: Progress,
) -> None:
    """Train from `position` to the recipe's last epoch, or until validation has not improved for `patience` epochs.

    Raises:
        DivergedError: the loss became NaN or infinite; the weights are those before that step.
        Interrupted: Ctrl-C; what a resume needs was saved.
        PhotoError: a photo can no longer be read.
    """
    total = recipe.epochs * loader.batches
    saved = started = time.monotonic()
    offset, photos = position.total_seconds, len(loader.paths)
    bar = progress.task("training", recipe.epochs * photos, "images", done=position.epoch * photos + position.seen)
    with listening() as stop, bar as task:
        while position.epoch < recipe.epochs and not out_of_patience(position, recipe):
            network.train()
            began = time.monotonic()
            for pixels, labels in loader.epoch(position.epoch, position.batch):
                torch.manual_seed(recipe.seed * 1_000_003 + position.step)  # dropout follows from seed and step
                rate = set_learning_rate(optimizer, learning_rate(recipe, position.step, total))
                targets = torch.from_numpy(labels).to(device)  # N
                images = normalise(torch.from_numpy(pixels).to(device), view)  # N x 3 x H x W

                with save_memory():  # the same bits, in a third less memory (docs/norm.md)
                    outputs = network(images)  # N x classes, or a tuple of them: main, auxiliary ...
                loss = total_loss(outputs, targets, recipe)
                value = loss.item()
                if not math.isfinite(value):
                    raise _diverged(f"the loss became {value}", position, rate, recipe)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

                main = outputs[0] if isinstance(outputs, tuple) else outputs
                now = time.monotonic()
                position.count(len(labels), loss=value, right=int((main.argmax(1) == targets).sum()))
                position.seconds += now - began  # the wait for photos counted in
                position.total_seconds = offset + now - started
                task.advance(len(labels), epoch=position.epoch + 1, loss=position.loss / position.seen)
                if stop.asked:
                    hooks.save(position)
                    raise Interrupted(f"interrupted after step {position.step}")
                if now - saved >= recipe.checkpoint_seconds:
                    hooks.save(position)
                    saved = time.monotonic()
                began = time.monotonic()

            rate = learning_rate(recipe, position.step - 1, total)
            try:
                evaluation = hooks.judge()
            except DivergedError as error:
                raise _diverged(error.problem, position, rate, recipe) from None
            position.total_seconds = offset + time.monotonic() - started
            row, is_best = judge_epoch(position, evaluation, rate)
            position.rows.append(row)
            position.best = row if is_best else position.best
            position.begin_epoch()
            hooks.epoch_done(position, row, is_best)
            hooks.save(position)
            saved = time.monotonic()
            if stop.asked:
                raise Interrupted(f"interrupted after epoch {position.epoch}")


def _diverged(what: str, position: Position, rate: float, recipe: Recipe) -> DivergedError:
    or_else = "" if recipe.init else ", or a network with batch normalisation"
    return DivergedError(
        f"{what} at step {position.step + 1} (epoch {position.epoch + 1}), at a learning rate of {rate:.3g}",
        f"try --learning-rate at a third of it{or_else}",
    )


def total_loss(outputs: Tensor | tuple[Tensor, ...], targets: Tensor, recipe: Recipe) -> Tensor:
    """Cross-entropy of the main output, plus `auxiliary_weight` times that of each auxiliary one."""
    main, *auxiliary = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = F.cross_entropy(main, targets, label_smoothing=recipe.label_smoothing)
    for output in auxiliary:
        loss = loss + recipe.auxiliary_weight * F.cross_entropy(output, targets, label_smoothing=recipe.label_smoothing)
    return loss


def make_optimizer(network: TableNetwork, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or Adam. Weight decay is for matrices and filters, not gamma, beta and biases."""
    groups = [
        {"params": chosen, "weight_decay": decay, "factor": factor}
        for factor, parameters in _by_factor(network, recipe.trunk_rate)
        for decay, chosen in (
            (recipe.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        )
    ]
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.learning_rate)
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0)


def _by_factor(network: TableNetwork, trunk_rate: float) -> Iterator[tuple[float, list[nn.Parameter]]]:
    """What is trained, by the factor on its learning rate: the trunk's, and 1 for the last layer and the heads."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    slow = {name for name in trained if name.split(".")[0] in network.order and trunk_rate != 1}
    if slow:
        yield trunk_rate, [p for name, p in trained.items() if name in slow]
    yield 1.0, [p for name, p in trained.items() if name not in slow]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set it for all parameters, each group's times its factor, and give it back."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)  # a state.pt from before there were factors has none
    return rate


def judge_epoch(position: Position, evaluation: Evaluation, rate: float) -> tuple[Row, bool]:
    """The metrics of the epoch that has just ended, and whether it is the best (by val accuracy, ties by loss)."""
    row: Row = {
        "epoch": position.epoch + 1,
        "step": position.step,
        "learning_rate": rate,
        "train_loss": position.loss / position.seen,
        "train_top1": position.right / position.seen,
        "val_loss": evaluation.loss,
        "val_top1": evaluation.top1,
        "images_per_second": position.seen / max(position.seconds, 1e-9),
        "seconds": position.total_seconds,
    }
    best = position.best
    return row, best is None or (row["val_top1"], -row["val_loss"]) > (best["val_top1"], -best["val_loss"])


def out_of_patience(position: Position, recipe: Recipe) -> bool:
    """Whether the best epoch lies `patience` epochs back."""
    if not recipe.patience or position.best is None:
        return False
    return position.epoch - int(position.best["epoch"]) >= recipe.patience
