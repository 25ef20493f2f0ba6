"""`NormWatch`, a callback of Lightning that does what `health.watch` does. It needs lightning or pytorch-lightning."""

from typing import TYPE_CHECKING

from bnlab.health.check import Finding
from bnlab.health.epoch import Health
from bnlab.health.watch import Watch, watch

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError:
        try:
            from pytorch_lightning import Callback, LightningModule, Trainer
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                "bnlab.health.lightning needs Lightning: pip install lightning", name="lightning"
            ) from None


class NormWatch(Callback):
    """Watches the batch normalisation of a LightningModule while it is trained; see `health.watch`.

    The totals go to the loggers of the trainer, and findings to the logger "bnlab" and to `findings`. In a distributed
    training, process 0 measures.

    >>> from bnlab.health.lightning import NormWatch
    >>> trainer = Trainer(callbacks=[NormWatch()])
    """

    def __init__(self, *, every: int = 64, window: int = 8, report_every: int = 512) -> None:
        """As `health.watch`."""
        super().__init__()
        self._settings = {"every": every, "window": window, "report_every": report_every}
        self._watch: Watch | None = None
        self.health: Health | None = None
        """what the last report says"""
        self.findings: tuple[Finding, ...] = ()
        """all findings so far, each check's last one"""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        def log(_: int, health: Health) -> None:
            assert self._watch is not None
            self.health, self.findings = health, self._watch.findings
            for logger in trainer.loggers:
                logger.log_metrics(health.scalars(), step=trainer.global_step)

        self._watch = watch(pl_module, log=log, **self._settings).__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(exception)

    def _end(self, error: BaseException | None) -> None:
        if self._watch is not None:
            self._watch.__exit__(None if error is None else type(error), error, None)
            self._watch = None
