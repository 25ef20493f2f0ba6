"""Compare what a training can start from: initial weights with and without BN, and fine-tuning.

    python benchmarks/start.py initialisation [SEEDS]
    python benchmarks/start.py scratch PHOTOS [SEEDS]
    python benchmarks/start.py tuning PHOTOS [SEEDS]

`initialisation` trains the small Inception on scikit-learn's digits; 3 seeds take about 12 minutes on two cores.
`scratch` trains GoogLeNet on a folder of photos for 2 epochs at 96 px. `tuning` trains on the first half of the classes
and fine-tunes on the others; then it trains on half of the photos and fine-tunes on the other half. Every seed has its
own split and initial weights. The scripts print the val accuracy of the last epoch, by which nothing was chosen; a
diverged training counts as guessing.
"""

import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from bnlab import train
from bnlab.data.digits import write_digits
from bnlab.errors import DivergedError
from bnlab.machine import environment

Starts = Mapping[str, Mapping[str, Any]]
# A short training, with the settings that the recipe had when the figures of docs/nets.md were measured.
QUICK = {
    "epochs": 2, "size": 96, "start_size": 1.0, "pre_resize": 0.0, "learning_rate": 0.1, "precision": "float32",
    "recalibration_images": 0,
}  # fmt: skip


def initialisation(seeds: int) -> None:
    """Compare initial weights at learning rates that are easy, hard and too high without BN."""
    starts: Starts = {
        "BN, He": {"network": "bn_small_inception"},
        "BN, N(0, 0.01^2)": {"network": "bn_small_inception", "initialisation": "gaussian:0.01"},
        "no BN, He": {"network": "small_inception"},
        "no BN, N(0, 0.01^2)": {"network": "small_inception", "initialisation": "gaussian:0.01"},
        "no BN, LSUV on the first batch": {"network": "small_inception", "lsuv_init": True},
    }
    with tempfile.TemporaryDirectory() as home:
        photos = Path(home, "digits")
        write_digits(photos)
        for rate in (0.01, 0.03, 0.1):
            _table(
                f"digits, 6 epochs, learning rate {rate}",
                photos,
                starts,
                seeds,
                recipe="digits",
                epochs=6,
                learning_rate=rate,
                val=0.3,
            )


def scratch(photos: Path, seeds: int) -> None:
    """Train GoogLeNet with and without BN, from He's weights, from torchvision's scale and from LSUV."""
    starts: Starts = {
        "BN, He": {"network": "bn_googlenet"},
        "BN, N(0, 0.01^2)": {"network": "bn_googlenet", "initialisation": "gaussian:0.01"},
        "no BN, He, a tenth of the rate": {"network": "googlenet", "learning_rate": 0.01},
        "no BN, N(0, 0.01^2), a tenth of the rate": {
            "network": "googlenet",
            "initialisation": "gaussian:0.01",
            "learning_rate": 0.01,
        },
        "no BN, LSUV, a tenth of the rate": {"network": "googlenet", "lsuv_init": True, "learning_rate": 0.01},
    }
    _table("GoogLeNet, 2 epochs at 96 px", photos, starts, seeds, **QUICK)


def tuning(photos: Path, seeds: int) -> None:
    """Fine-tune a network that was trained on other classes, and one trained on other photos of the same classes."""
    classes = sorted(folder for folder in photos.iterdir() if folder.is_dir())
    half = len(classes) // 2
    with tempfile.TemporaryDirectory() as home:
        for number, folder in enumerate(classes):
            _link(folder.iterdir(), Path(home, "known" if number < half else "new", folder.name))
        _tune(Path(home), f"{len(classes) - half} classes after {half} others", seeds)
    with tempfile.TemporaryDirectory() as home:
        for folder in classes:
            files = sorted(folder.iterdir())
            _link(files[::2], Path(home, "known", folder.name))
            _link(
                files[1::2], Path(home, "new", f"another {folder.name}")
            )  # another name, so that the last layer is new
        _tune(Path(home), f"{len(classes)} classes after other photos of them", seeds)


def _link(files: Iterable[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for file in files:
        (folder / file.name).symlink_to(file.resolve())


def _tune(home: Path, title: str, seeds: int) -> None:
    known = train(home / "known", runs=home / "runs", name="known", size=96, epochs=8)
    print(f"\nthe network to fine-tune: {known.rows[-1]['val_top1']:.1%} of its val photos after 8 epochs")
    init = str(known.run.last)
    starts: Starts = {
        "from scratch": {},
        "fine-tuned, backbone at a tenth of the rate": {"init": init},
        "fine-tuned, backbone at the full rate": {"init": init, "backbone_lr_factor": 1.0},
        "fine-tuned, statistics frozen": {"init": init, "freeze_bn": True},
        "fine-tuned, stem frozen": {"init": init, "freeze": "stem"},
        "last layer only": {"init": init, "freeze": "backbone"},
    }
    _table(f"{title}, 2 epochs at 96 px", home / "new", starts, seeds, **QUICK)


def _table(title: str, photos: Path, starts: Starts, seeds: int, **common: Any) -> None:
    print(f"\n{title}, {seeds} seeds\n\n| start | val accuracy, mean | lowest | highest | diverged |")
    print("| --- | --- | --- | --- | --- |")
    for name, start in starts.items():
        values = list(_accuracies(photos, range(seeds), common | dict(start)))
        right = [1 / _classes(photos) if value is None else value for value in values]
        low, high = min(right), max(right)
        print(f"| {name} | {statistics.mean(right):.1%} | {low:.1%} | {high:.1%} | {values.count(None)} |", flush=True)


def _accuracies(photos: Path, seeds: Iterable[int], options: Mapping[str, Any]) -> Iterable[float | None]:
    for seed in seeds:
        with tempfile.TemporaryDirectory() as runs:
            try:
                yield float(train(photos, runs=runs, seed=seed, split_seed=seed, **options).rows[-1]["val_top1"])
            except DivergedError:
                yield None


def _classes(photos: Path) -> int:
    return sum(folder.is_dir() for folder in photos.iterdir())


if __name__ == "__main__":
    part, *rest = sys.argv[1:] or ["initialisation"]
    machine = environment("cpu")
    print(f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}")
    if part == "initialisation":
        initialisation(int(rest[0]) if rest else 3)
    else:
        {"scratch": scratch, "tuning": tuning}[part](Path(rest[0]), int(rest[1]) if rest[1:] else 3)
