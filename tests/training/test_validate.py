from pathlib import Path

import pytest

from bnlab.data.preprocess import Preprocessing
from bnlab.training.validate import calibration_batches
from tests.conftest import write_photos

VIEW = Preprocessing(size=32, resize="squash", crop_fraction=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("photos", "batch_size", "sizes"),
    [
        (12, 5, [5, 5, 2]),
        (11, 5, [4, 4, 3]),  # not 5, 5, 1
        (9, 4, [3, 3, 3]),
        (7, 2, [4, 3]),
        (3, 2, [3]),
        (2, 8, [2]),
        (1, 8, [1]),
    ],
)
def test_no_photo_is_left_over_alone(tmp_path: Path, photos: int, batch_size: int, sizes: list[int]) -> None:
    """A single one has no variance behind a fully connected layer, and a training would end at its first judgement."""
    paths = [str(path) for path in sorted(write_photos(tmp_path / "photos", each=4).glob("*/*"))[:photos]]
    batches = list(calibration_batches(paths, VIEW, batch_size=batch_size, device="cpu"))
    assert [len(batch) for batch in batches] == sizes
