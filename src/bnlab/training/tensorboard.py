"""TensorBoard's event file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bnlab.files import storage_errors
from bnlab.health.findings import Health
from bnlab.runs import Run
from bnlab.training.checkpoint import Row

_SCALARS = ("train_loss", "train_top1", "val_loss", "val_top1", "running_top1", "learning_rate", "images_per_second")
_OF_LAYERS = ("mean_off", "variance_off", "effective_batch", "dead", "gamma_near_zero")


@contextmanager
def tensorboard(run: Run, step: int) -> Iterator[Callable[[Row, Health], None]]:
    """Gives a function that logs an epoch's metrics and the health of its normalisation.

    Events after `step`, of a sitting that was killed, are hidden.

    Raises:
        StorageError: no space left.
    """
    from torch.utils.tensorboard import SummaryWriter

    with storage_errors(run.events):
        writer = SummaryWriter(run.events, purge_step=step + 1 if step else None)

    def log(row: Row, health: Health) -> None:
        step = int(row["step"] or 0)
        with storage_errors(run.events):
            for key in _SCALARS:
                if row[key] is not None:
                    writer.add_scalar(key.replace("_", "/", 1), row[key], step)
            for key, value in health.scalars().items():
                writer.add_scalar(key.replace("_", "/", 1), value, step)
            for layer in health.layers:
                for key in _OF_LAYERS:
                    if (value := getattr(layer, key)) is not None:
                        writer.add_scalar(f"norm_{key}/{layer.name}", value, step)
            writer.flush()

    try:
        yield log
    finally:
        with storage_errors(run.events):
            writer.close()
