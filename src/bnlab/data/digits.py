"""The data of the demo: scikit-learn's bundled handwritten digits, written as a folder of classes."""

from pathlib import Path

import numpy as np
from PIL import Image

from bnlab.files import new_folder


def write_digits(folder: Path) -> int:
    """Write the 1,797 digits as 8 x 8 grey PNGs into `folder/0` .. `folder/9`, and return their number.

    Source: the UCI ML hand-written digits (Alpaydin & Kaynak 1998), as in sklearn.datasets.load_digits.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    with new_folder(folder) as draft:
        for label in range(10):
            (draft / str(label)).mkdir()
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            pixels = np.round(image * (255 / 16)).astype(np.uint8)  # 8 x 8; from 0..16 to 0..255
            Image.fromarray(pixels).save(draft / str(label) / f"{i:04d}.png")
    return len(digits.target)
