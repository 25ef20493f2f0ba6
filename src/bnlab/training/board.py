"""TensorBoard's event file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bnlab.files import storage_errors
from bnlab.runs import Run
from bnlab.training.checkpoint import Row

_SCALARS = ("train_loss", "train_top1", "val_loss", "val_top1", "running_top1", "learning_rate", "images_per_second")


@contextmanager
def tensorboard(run: Run, step: int) -> Iterator[Callable[[Row], None]]:
    """Gives a function that logs an epoch's metrics. Events after `step`, of a sitting that was killed, are
    hidden.

    Raises:
        StorageError: no space left.
    """
    from torch.utils.tensorboard import SummaryWriter

    with storage_errors(run.events):
        writer = SummaryWriter(run.events, purge_step=step + 1 if step else None)

    def log(row: Row) -> None:
        with storage_errors(run.events):
            for key in _SCALARS:
                if row[key] is not None:
                    writer.add_scalar(key.replace("_", "/", 1), row[key], int(row["step"] or 0))
            writer.flush()

    try:
        yield log
    finally:
        with storage_errors(run.events):
            writer.close()
