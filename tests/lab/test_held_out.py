from pathlib import Path

import pytest

from bnlab.data.dataset import open_recorded_data
from bnlab.data.split_csv import read_split_csv
from bnlab.lab.held_out import baseline_row, majority_baseline
from bnlab.lab.splits import open_study_splits
from bnlab.progress import NullProgress
from tests.conftest import write_photos


def test_to_guess_is_to_name_the_commonest_class(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=20)
    write_photos(photos, each=60, classes=("ring",), first=20)
    split = open_study_splits(
        photos, quick=True, min_photos=10, folder=tmp_path / "sides", progress=NullProgress()
    ).for_seed(0)
    test = [photo.label for photo in read_split_csv(split) if photo.split == "test"]
    dataset = open_recorded_data(split)
    assert majority_baseline(dataset) == pytest.approx(test.count("ring") / len(test))
    assert majority_baseline(dataset) > 0.5
    row = baseline_row(7, dataset)
    assert (row["step"], row["n_test"]) == (7, len(test))
    assert row["val_top1"] == row["test_top1"] == row["guess"] == majority_baseline(dataset)
