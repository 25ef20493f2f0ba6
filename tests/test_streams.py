import re
from itertools import product
from pathlib import Path

import bnlab
from bnlab.streams import Use, random_stream

GOLDEN = [811, 978, 844, 315, 8, 23, 421, 530, 124, 380]
NUMBERS = {Use.ORDER: 1, Use.AUGMENTATION: 2, Use.MIXUP: 1}  # that follow the use; none for the others


def test_no_two_streams_are_one() -> None:
    streams = [
        (seed, use, *numbers)
        for seed in (0, 1, 5)
        for use in Use
        for numbers in product((0, 1, 5), repeat=NUMBERS.get(use, 0))
    ]
    first = {random_stream(*stream).bytes(16) for stream in streams}
    assert len(first) == len(streams) > 50


def test_a_use_always_has_equally_many_numbers_and_nothing_draws_without_a_use() -> None:
    """Otherwise the zeros that numpy appends could make two streams one."""
    found: dict[str, set[int]] = {}
    for path in Path(bnlab.__file__).parent.rglob("*.py"):
        text = path.read_text("utf-8")
        assert path.name == "streams.py" or not re.search("default_rng|SeedSequence|RandomState", text), path
        for use, numbers in re.findall(r"random_stream\([^,()]+, Use\.(\w+)((?:, [\w.]+)*)\)", text):
            found.setdefault(use, set()).add(numbers.count(","))
    assert found == {use.name: {NUMBERS.get(use, 0)} for use in Use}


def test_streams_never_change_between_versions() -> None:
    """A version that changed them would change every training."""
    assert [int(random_stream(3, use, *[0] * NUMBERS.get(use, 0)).integers(1000)) for use in Use] == GOLDEN
