"""Names of classes from JSON and from lines. The tests of `bnlab import` hold the errors."""

from pathlib import Path

import pytest

from bnlab.data.class_names import read_classes
from bnlab.errors import UsageError


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.json", '{"0": "rose", "1": "tulip"}'), ("a.json", '["rose", "tulip"]'), ("a.txt", "rose\n\n tulip \n")],
)
def test_names_are_read_in_order(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name) == ("rose", "tulip")


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("rose\nrose\n")
    with pytest.raises(UsageError, match="for classes 0 and 1"):
        read_classes(tmp_path / "a.txt")
