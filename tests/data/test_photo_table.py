from itertools import repeat

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bnlab.data import photo_table
from bnlab.data.photo_table import DIGEST, TEXT, UNKNOWN, Table, read_table

ANY = st.text(st.characters(), max_size=8)  # surrogates too
DIGESTS = st.binary(min_size=32, max_size=32).map(bytes.hex)
ROWS = st.lists(st.tuples(ANY, ANY, ANY, ANY | DIGESTS | DIGESTS.map(str.upper) | st.just("")), max_size=12)


def rows_of(table: Table) -> list[tuple[str, str, str, str]]:
    return list(table.rows(np.arange(len(table.label), dtype=np.int32)))


@given(ROWS)
@example([("\udcc3\udca9/\ud800", "a", "val", "\udcff")])  # "é" in undecodable bytes, which it must not become
def test_every_string_comes_back(rows: list[tuple[str, str, str, str]]) -> None:
    assert rows_of(read_table(iter(rows))) == rows


def test_a_sha256_is_32_bytes_unless_it_is_another_text() -> None:
    table = read_table(("p", "a", "val", text) for text in ("", "ab" * 32, "AB" * 32, "ab" * 31, "none"))
    assert table.kind.tolist() == [UNKNOWN, DIGEST, TEXT, TEXT, TEXT]
    assert sorted(table.texts) == [2, 3, 4]
    assert len({bytes(digest) for digest in table.digest}) == 5


def test_a_folder_is_stored_once_for_as_long_as_it_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [f"/photos/{folder}/{number}.jpg" for number in range(3) for folder in "abc"]
    rows = [(path, "a", "val", "") for path in paths]
    table = read_table(rows)
    assert table.folders.blob == b"/photos/a//photos/b//photos/c/"
    monkeypatch.setattr(photo_table, "MAX_FOLDERS", 2)
    forgetful = read_table(rows)
    assert forgetful.folder.tolist() == list(range(9))
    assert rows_of(forgetful) == rows_of(table) == rows


def test_chunks_are_joined_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(f"{i // 2}/{i}.jpg", str(i % 3), "val", f"{i:064x}") for i in range(7)]
    monkeypatch.setattr(photo_table, "CHUNK", 3)
    assert rows_of(read_table(rows)) == rows


def test_a_sha256_may_be_learned_later() -> None:
    table = read_table(("p", "a", "val", text) for text in ("", "odd", "ab" * 32))
    later = table.with_sha256([(0, "cd" * 32), (1, "ef" * 32), (2, "text")])
    assert [row[3] for row in rows_of(later)] == ["cd" * 32, "ef" * 32, "text"]
    assert [row[3] for row in rows_of(table)] == ["", "odd", "ab" * 32]


def test_more_sides_than_there_are() -> None:
    with pytest.raises(OverflowError):
        read_table(zip(repeat("p"), repeat("a"), map(str, range(257)), repeat("")))
