"""What the tables on the screen contain."""

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from bnlab.classifier.predict import Candidate, Prediction
from bnlab.cli import render
from bnlab.commands.predict import PredictResult
from bnlab.commands.split import SplitResult
from bnlab.data.duplicates import Group
from bnlab.data.photos import Photo
from bnlab.data.scan import Refusal
from bnlab.data.split import Split


def lines_of(shown: RenderableType) -> list[list[str]]:
    """The words of each line."""
    file = io.StringIO()
    Console(file=file, width=200).print(shown)
    return [line.split() for line in file.getvalue().splitlines()]


def split_result(groups: list[Group]) -> SplitResult:
    photos = [Photo(f"{label}/{i}.jpg", label, split) for label in "ab" for i, split in enumerate(("train", "val"))]
    split = Split(folder=Path("x"), photos=photos, refused=[Refusal("a/bad.jpg", "it is empty")], groups=groups)
    return SplitResult(split=split, folder=Path("out"), written=True, refused=tuple(split.refused))


def test_the_split_table_counts_photos_and_names_conflicts() -> None:
    lines = lines_of(render.split_table(split_result([Group((0, 1), True), Group((1, 2), False)])))
    assert lines[:4] == [
        ["class", "train", "val", "all"],
        ["a", "1", "1", "2"],
        ["b", "1", "1", "2"],
        ["all", "2", "2", "4"],
    ]
    rest = [" ".join(line) for line in lines[4:]]
    assert rest[0].startswith("1 photo cannot be used")
    assert rest[1].startswith("2 photos are duplicates (1 group)")
    assert rest[2:] == ["label conflict: a/1.jpg (a) = b/0.jpg (b)"]


@pytest.mark.parametrize(("conflicts", "more"), [(10, False), (12, True)])
def test_only_the_first_label_conflicts_are_named(conflicts: int, more: bool) -> None:
    lines = [" ".join(line) for line in lines_of(render.split_table(split_result([Group((0, 2), True)] * conflicts)))]
    assert sum(line.startswith("label conflict: ") for line in lines) == 10
    assert ("and 2 more label conflicts" in lines) == more


def test_the_prediction_table_shows_refused_photos_and_escapes_names() -> None:
    good = Prediction("x\n.jpg", "cat", 0.75, (Candidate("cat", 0.75), Candidate("dog", 0.25)))
    bad = Prediction("bad.jpg", None, None, (), "it is empty")
    shown = render.prediction_table(PredictResult(predictions=[good, bad], picture=None))
    assert lines_of(shown) == [
        ["photo", "class", "probability", "others"],
        ["x\\n.jpg", "cat", "75.0%", "dog", "25.0%"],
        ["bad.jpg", "cannot", "be", "used"],
    ]


def test_the_network_list_names_variants_only_where_there_are_several() -> None:
    common = {"summary": "text", "stems": ["small"]}
    networks = [{"name": "one", "variants": ["v"], **common}, {"name": "two", "variants": ["v", "w"], **common}]
    assert lines_of(render.network_list(networks))[1:] == [
        ["one", "text", "small"],
        ["two", "text", "v,", "w", "small"],
    ]
