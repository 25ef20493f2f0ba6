"""The plain way of PyTorch's tutorials, with which the other benchmarks compare.

It has contiguous tensors, Pillow, a DataLoader without workers, and torch's own layers and defaults.

    python benchmarks/plain.py train PHOTOS [SIZE]
    python benchmarks/plain.py evaluate PHOTOS [SIZE]

The script prints images per second of bn_googlenet, with both auxiliary heads in training, and the peak resident memory
in MiB.
"""

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bnlab.nets import build

BATCH = 32
MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))


class Photos(Dataset[tuple[Tensor, int]]):
    """A folder of classes: random crops, half of them flipped, or the centre."""

    def __init__(self, folder: Path, size: int, *, training: bool) -> None:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        self.items = [(path, i) for i, label in enumerate(classes) for path in sorted(label.iterdir())]
        self.size, self.training = size, training
        self.random = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        path, label = self.items[i]
        image = Image.open(path).convert("RGB")
        scale = float(np.sqrt(self.random.uniform(0.25, 1))) if self.training else 0.9
        side = scale * min(image.size)
        left, top = ((full - side) * (self.random.random() if self.training else 0.5) for full in image.size)
        box = (left, top, left + side, top + side)
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BILINEAR, box=box))
        if self.training and self.random.random() < 0.5:
            pixels = pixels[:, ::-1]
        values = torch.from_numpy(pixels.copy()).float() / 255
        return ((values - MEAN) / STD).permute(2, 0, 1).contiguous(), label


def training(photos: Path, size: int) -> Iterator[int]:
    """Train without end, and yield the number of photos after each step."""
    torch.manual_seed(0)
    loader = DataLoader(Photos(photos, size, training=True), BATCH, shuffle=True, drop_last=True)
    network = build("bn_googlenet", classes=5, auxiliary=True, norm=nn.BatchNorm2d).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    while True:
        for images, labels in loader:
            optimizer.zero_grad()
            outputs = network(images)
            losses = [F.cross_entropy(output, labels, label_smoothing=0.1) for output in outputs]
            loss = losses[0] + 0.3 * (losses[1] + losses[2])
            loss.backward()
            optimizer.step()
            loss.item()
            yield len(labels)


@torch.no_grad()
def evaluation(photos: Path, size: int) -> Iterator[int]:
    """Evaluate without end, and yield the number of photos after each batch."""
    network = build("bn_googlenet", classes=5, norm=nn.BatchNorm2d).eval()
    loader = DataLoader(Photos(photos, size, training=False), BATCH, drop_last=True)
    while True:
        for images, _ in loader:
            network(images).softmax(1).numpy()
            yield BATCH


def report(steps: Iterator[int], number: int = 12, warm: int = 3) -> None:
    """Print the median images per second of so many steps, and the peak resident memory in MiB."""
    rates = []
    began = time.perf_counter()
    for step, photos in enumerate(steps):
        now = time.perf_counter()
        if step >= warm:
            rates.append(photos / (now - began))
        if step + 1 == number:
            break
        began = now
    print(statistics.median(rates), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


if __name__ == "__main__":
    what = {"train": training, "evaluate": evaluation}[sys.argv[1]]
    report(what(Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 224))
