import csv
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bnlab.health.lightning import NormWatch

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, of torch's deprecations


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(64, 3, 2, 2), torch.arange(64) % 2), batch_size=4)


def trainer(folder: object, callback: NormWatch) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[callback],
        logger=CSVLogger(folder),  # type: ignore[arg-type]
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )


def test_a_training_with_lightning_is_watched(tmp_path: object) -> None:
    callback, module = NormWatch(every=8, report_every=16), Module()
    runs = trainer(tmp_path, callback)
    runs.fit(module, loader())
    assert [finding.id for finding in callback.findings] == ["BN103"]
    assert [row.batches for row in callback.health.layers] == [16]
    rows = csv.DictReader(Path(runs.logger.log_dir, "metrics.csv").read_text("utf-8").splitlines())
    assert [row["step"] for row in rows if row["norm_effective_batch_smallest"]] == ["16", "32"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_training_that_fails_leaves_no_hooks(tmp_path: object) -> None:
    class Fails(Module):
        def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            super().training_step(batch)
            raise KeyError("mine")

    module = Fails()
    with pytest.raises(KeyError, match="mine"):
        trainer(tmp_path, NormWatch()).fit(module, loader())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
