"""Four trainings at a fixed seed, against the losses and weights that golden.json records for some machines.

On a machine with a recorded fingerprint (processor, torch, threads, allocator), losses and weights are the same to the
bit. On any other machine the losses of the first epoch are near those of the first record; rounding grows with every
step. This adds a record of this machine; before a change that is meant to alter results is recorded, remove the file:

    OMP_NUM_THREADS=2 python -m tests.training.test_golden
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from bnlab import train
from bnlab.files import read_csv
from bnlab.machine import environment
from tests.conftest import write_photos

GOLDEN = Path(__file__).with_name("golden.json")
SMALL: dict[str, Any] = {"size": 64, "width": 0.25, "batch_size": 8, "epochs": 2, "workers": 0}
TRAININGS: dict[str, dict[str, Any]] = {
    "default": {"precision": "float32", "ema": 0.9, "mixup": 0.2},
    "classic": {"recipe": "classic", "norm": "ghost:4", "precision": "float32"},
    "bn-x5": {"recipe": "bn-x5", "learning_rate": 0.02, "precision": "float32"},
    "small_inception": {
        "network": "small_inception", "precision": "float32", "cutmix": 0.5, "learning_rate": 0.001,
    },
}  # fmt: skip
COLUMNS = ("train_loss", "train_top1", "val_loss", "val_top1", "running_top1")


def trained(name: str, home: Path) -> dict[str, Any]:
    """The metrics of the epochs, and a digest of the last weights."""
    write_photos(home / "data" / "train", each=8)
    write_photos(home / "data" / "val", each=4, first=100)
    run = train(home / "data", runs=home / "runs", **SMALL, **TRAININGS[name]).run
    digest = hashlib.sha256()
    for key, tensor in sorted(safetensors.torch.load(run.last.read_bytes()).items()):
        digest.update(key.encode())
        digest.update(tensor.numpy().tobytes())
    rows = [{key: float(row[key]) if row[key] else None for key in COLUMNS} for row in read_csv(run.metrics)]
    return {"rows": rows, "weights": digest.hexdigest()}


def fingerprint() -> dict[str, Any]:
    """What the bits depend on."""
    here = environment("cpu")
    capability = torch.backends.cpu.get_cpu_capability()
    return {key: here[key] for key in ("processor", "threads", "tuned")} | {
        "torch": torch.__version__, "capability": capability,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def recorded_threads() -> Iterator[None]:
    """Sums depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", ["default", pytest.param("classic", marks=pytest.mark.slow), "bn-x5", "small_inception"]
)
def test_results_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    records, found = json.loads(GOLDEN.read_text()), trained(name, tmp_path)
    for record in records:
        if record["fingerprint"] == fingerprint():
            assert found == record["trainings"][name]
    expected, row = records[0]["trainings"][name]["rows"][0], found["rows"][0]
    assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=2e-3)
    assert row["val_loss"] == pytest.approx(expected["val_loss"], rel=2e-2)
    assert [r["running_top1"] is None for r in found["rows"]] == [
        r["running_top1"] is None for r in records[0]["trainings"][name]["rows"]
    ]


if __name__ == "__main__":
    trainings = {}
    for name in TRAININGS:
        with tempfile.TemporaryDirectory() as home:
            trainings[name] = trained(name, Path(home))
    others = [r for r in json.loads(GOLDEN.read_text()) if r["fingerprint"] != fingerprint()] if GOLDEN.exists() else []
    GOLDEN.write_text(json.dumps([*others, {"fingerprint": fingerprint(), "trainings": trainings}], indent=1) + "\n")
