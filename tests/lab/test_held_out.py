from pathlib import Path

import pytest

from bnlab.data.listing import read_list
from bnlab.data.source import open_recorded_data
from bnlab.lab.held_out import guess_of, guessing
from bnlab.lab.sides import open_sides
from bnlab.progress import Silent
from tests.conftest import write_photos


def test_to_guess_is_to_name_the_commonest_class(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", each=20)
    write_photos(photos, each=60, classes=("ring",), first=20)
    split = open_sides(photos, quick=True, least=10, folder=tmp_path / "sides", progress=Silent()).of(0)
    test = [photo.label for photo in read_list(split) if photo.split == "test"]
    source = open_recorded_data(split)
    assert guess_of(source) == pytest.approx(test.count("ring") / len(test))
    assert guess_of(source) > 0.5
    row = guessing(7, source)
    assert (row["step"], row["n_test"]) == (7, len(test))
    assert row["val_top1"] == row["test_top1"] == row["guess"] == guess_of(source)
