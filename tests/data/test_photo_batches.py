"""Batches of photos for a network in memory: shuffled, the same each time, without photos that cannot be used."""

from pathlib import Path

import numpy as np
import torch

from bnlab.data.photo_batches import PhotoBatches
from bnlab.data.photos import Photos
from bnlab.data.preprocess import Preprocessing
from bnlab.data.scan import scan
from tests.conftest import CLASSES

SMALL = Preprocessing(size=16, resize="squash", crop_fraction=1.0, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def batches(photos: Path, images: int = 100, batch_size: int = 8) -> PhotoBatches:
    return PhotoBatches(
        photos=Photos.of(scan(photos, [])),
        classes=CLASSES,
        preprocessing=SMALL,
        batch_size=batch_size,
        images=images,
        workers=0,
    )


def test_each_time_gives_the_same_shuffled_batches(photos: Path) -> None:
    found = batches(photos)
    first, second = ([*found] for _ in range(2))
    assert [len(y) for _, y in first] == [8, 8, 8, 8, 4]
    assert len(found) == 5
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(first, second, strict=True))
    labels = torch.cat([y for _, y in first])
    assert labels.bincount().tolist() == [12, 12, 12]
    assert len(set(labels[:8].tolist())) > 1
    assert first[0][0].shape == (8, 3, 16, 16)
    assert -1 <= float(first[0][0].min()) < float(first[0][0].max()) <= 1


def test_a_sample_has_no_batch_of_one(photos: Path) -> None:
    assert [len(y) for _, y in batches(photos, images=20)] == [8, 8, 4]
    assert [len(y) for _, y in batches(photos, images=17)] == [8, 8]


def test_photos_that_cannot_be_used_are_left_out_with_their_labels(photos: Path) -> None:
    (photos / "ring" / "ring003.png").write_bytes(b"no picture")
    found = batches(photos)
    for _ in range(2):
        labels = np.concatenate([y.numpy() for _, y in found])
        assert np.bincount(labels).tolist() == [12, 11, 12]
        assert [Path(refusal.path).name for refusal in found.refused] == ["ring003.png"]
