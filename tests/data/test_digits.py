from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from bnlab.data.digits import write_digits


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    assert write_digits(tmp_path / "digits") == 1797
    assert sorted(p.name for p in (tmp_path / "digits").iterdir()) == list("0123456789")
    assert len(list((tmp_path / "digits").rglob("*.png"))) == 1797
    digits = load_digits()
    path = tmp_path / "digits" / str(digits.target[123]) / "0123.png"
    assert np.abs(np.asarray(Image.open(path)) / 255 * 16 - digits.images[123]).max() < 0.04
