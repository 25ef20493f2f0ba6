"""Measure what a long list of photos costs: time to open it, memory to keep it, and time of a training step with it.

    python benchmarks/index.py [ROUNDS]

The two lists have 10,000 and 1,000,000 photos in 1,000 classes; a twentieth of the photos is val. There are few files:
every class is a link to one folder, whose 1,000 names are hard links to 16 images. Each measurement runs in a separate
process, and the two lists take turns. A list is opened as `bnlab train` opens it: it is read and checked, every file is
looked up, and the run's own list is written. Then bn_googlenet trains on 16 photos of 64 px a step, which the same
thread reads between the steps. Peaks are the highest resident memory so far; torch is imported after the first peak,
so that its memory does not hide the list's. Three rounds take about three minutes on one core. The script needs Linux.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from bnlab.data.dataset import open_training_data
from bnlab.data.photos import Photo
from bnlab.data.split_csv import report_missing_classes, write_split_csv
from bnlab.data.verify import stamp_of
from bnlab.progress import NullProgress

SIZES = (10_000, 1_000_000)
CLASSES, NAMES, IMAGES = 1000, 1000, 16
BATCH, PIXELS, WARM_UP, STEPS = 16, 64, 2, 10

Found = dict[str, float]


def main(rounds: int) -> None:
    from bnlab.machine import environment

    machine = environment("cpu")
    print(f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}")
    found: dict[int, list[Found]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory() as home:
        _make(Path(home))
        for _ in range(rounds):
            for size in SIZES:
                command = [sys.executable, __file__, "one", str(_list(Path(home), size))]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[size].append(json.loads(done.stdout))
        path = next(_photos(Path(home), 1)).path
    print(f"{rounds} rounds, median (lowest to highest); paths of {len(path)} characters; steps: {STEPS} a round\n")
    print("| photos | seconds to open | to write the run's list | peak MB, opened | ms a step | peak MB, trained |")
    print("| --- | --- | --- | --- | --- | --- |")
    for size in SIZES:
        cells = [_spread(found[size], key) for key in ("open", "write", "opened", "step", "trained")]
        print(f"| {size:,} | {' | '.join(cells)} |")
    for key in ("opened", "trained"):
        small, large = (statistics.median(one[key] for one in found[size]) for size in SIZES)
        print(f"\nadditional memory for the long list, {key}: {large - small:.0f} MB")


def _spread(found: list[Found], key: str) -> str:
    values = [one[key] for one in found]
    digits = 2 if key in ("open", "write") else 0
    low, middle, high = (f"{value:.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def _make(home: Path) -> None:
    """The photos and both lists."""
    images, names = home / "images", home / "names"
    images.mkdir()
    names.mkdir()
    random = np.random.default_rng(0)
    for i in range(IMAGES):
        small = Image.fromarray(random.integers(0, 256, (8, 10, 3), dtype=np.uint8))
        small.resize((500, 400), Image.Resampling.BICUBIC).save(images / f"{i}.jpg")
    for i in range(NAMES):
        os.link(images / f"{i % IMAGES}.jpg", names / _name(i))
    (home / "photos" / "train").mkdir(parents=True)
    for i in range(CLASSES):
        (home / "photos" / "train" / _label(i)).symlink_to(names)
    for size in SIZES:
        write_split_csv(_list(home, size), _photos(home, size), absolute=False)


def _photos(home: Path, number: int) -> Iterator[Photo]:
    each = number // CLASSES or 1
    for i in range(number):
        label, split = _label(i // each), "val" if i % 20 == 0 else "train"
        path = f"{home}/photos/train/{label}/{_name(i % each)}"
        sha256 = f"{i * 0x9E3779B97F4A7C15 % 2**64:016x}" * 4  # made up, so that no two are the same
        yield Photo(path, label, split, sha256, stamp_of(path))


def _label(i: int) -> str:
    return f"n{i:08}"


def _name(i: int) -> str:
    return f"{i:010}.JPEG"


def _list(home: Path, size: int) -> Path:
    return home / f"{size}.csv"


def one(data: Path) -> Found:
    """All measurements of one list, in this process."""
    start = time.perf_counter()
    dataset = open_training_data(data, val=0.2, seed=0, progress=NullProgress())
    report_missing_classes(dataset.photos, "val", NullProgress())
    opened = time.perf_counter()
    write_split_csv(data.with_suffix(".copy"), dataset.photos)
    found = {"open": opened - start, "write": time.perf_counter() - opened, "opened": _peak()}

    import torch
    from torch.nn import functional as F

    from bnlab.data.augment import augment
    from bnlab.data.loader import TrainingLoader
    from bnlab.nets.build import build, move_network

    loader = TrainingLoader(
        dataset.in_split("train"),
        dataset.classes,
        short_side=0,
        augment=partial(augment, area=(0.35, 1.0), aspect=(0.75, 4 / 3), flip=0.5),
        batch_size=BATCH,
        seed=0,
        workers=0,
    )
    val = dataset.in_split("val")
    network = move_network(build("bn_googlenet", classes=len(dataset.classes)), "cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    batches, seconds = loader.epoch(0, PIXELS), []
    for _ in range(WARM_UP + STEPS):
        start = time.perf_counter()
        pixels, labels = next(batches)
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 128 - 1  # N x 3 x 64 x 64
        optimizer.zero_grad()
        outputs = network(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(F.cross_entropy(output, torch.from_numpy(labels)) for output in outputs).backward()  # type: ignore[union-attr]
        optimizer.step()
        seconds.append(time.perf_counter() - start)
    assert len(val) and len(loader.paths) + len(val) == len(dataset.photos)
    return found | {"step": 1e3 * statistics.median(seconds[WARM_UP:]), "trained": _peak()}


def _peak() -> float:
    """The highest resident memory of this process so far, in MB; getrusage would include that of the parent process."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
    assert found
    return int(found[1]) * 1024 / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        print(json.dumps(one(Path(sys.argv[2]))))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 3)
