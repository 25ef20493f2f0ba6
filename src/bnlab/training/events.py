"""The metrics of a run for TensorBoard."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bnlab.files import storage_errors
from bnlab.health.epoch import Health
from bnlab.runs import Run
from bnlab.training.state import Row

_SCALARS = ("train_loss", "train_top1", "val_loss", "val_top1", "running_top1", "learning_rate", "images_per_second")


def scalars(row: Row, health: Health) -> dict[str, float]:
    """The metrics of an epoch and the health of its layers, by their tags in TensorBoard."""
    values = {key.replace("_", "/", 1): row[key] for key in _SCALARS} | health.tags()
    return {tag: value for tag, value in values.items() if value is not None}


@contextmanager
def event_writer(run: Run, step: int) -> Iterator[Any]:
    """TensorBoard's writer, which hides the events after `step` that a killed process left."""
    from torch.utils.tensorboard import SummaryWriter

    with storage_errors(run.events):
        writer = SummaryWriter(run.events, purge_step=step + 1 if step else None)
    try:
        yield writer
    finally:
        with storage_errors(run.events):
            writer.close()
