import hashlib

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from bnlab.classifier import seen as module
from bnlab.classifier.seen import SeenCount, SeenPhotos, photos_by_split, union
from bnlab.data.photos import Photo, Photos


def photos(split: str, *numbers: int) -> list[Photo]:
    return [Photo(f"p/{n}.jpg", "a", split, hashlib.sha256(bytes([n])).hexdigest()) for n in numbers]


def seen(train: tuple[int, ...], val: tuple[int, ...] = ()) -> SeenPhotos:
    return SeenPhotos.of(Photos.of(photos("train", *train) + photos("val", *val)))


def counts(known: SeenPhotos, *numbers: int) -> tuple[int, int]:
    found = known.count(Photos.of(photos("test", *numbers)))
    assert found.n == len(numbers)
    return found.train, found.val


def test_photos_are_recognised_by_content() -> None:
    known = seen((1, 2, 3), (4, 5))
    assert known.complete
    assert counts(known, 1, 2, 5, 6, 7) == (2, 1)
    assert counts(known, 1, 1, 1) == (3, 0)  # three files of one content
    assert known == seen((3, 1, 2, 2), (5, 4))  # sorted, each once
    assert known.prefixes("val").tolist() == sorted(
        int.from_bytes(hashlib.sha256(bytes([n])).digest()[:8], "little") for n in (4, 5)
    )


def test_several_trainings_together_have_seen_what_any_has() -> None:
    both = union([seen((1, 2), (3,)), seen((3,), (4,))])
    assert counts(both, 1, 2, 3, 4, 5) == (3, 1)  # 3 chose an epoch of one and trained the other
    assert both.complete
    assert not (both | SeenPhotos()).complete


def test_zero_is_not_said_where_others_may_have_been_seen() -> None:
    partly = seen((1,), (2,)) | SeenPhotos()
    found = partly.count(Photos.of(photos("test", 1, 9)))
    assert (found.known("train"), found.known("val")) == (1, None)
    assert found.sentences("it was") == ["at least 1 of 2 photos is among those it was trained on"]
    nothing = partly.count(Photos.of(photos("test", 9)))
    assert nothing.sentences("it was") == ["which photos it was trained on is unknown"]
    assert SeenCount(n=1, train=0, val=0, complete=True).sentences("it was") == []


def test_photos_of_unknown_content_are_unknown() -> None:
    assert not SeenPhotos.of(Photos.of([Photo("a", "a", "train")])).complete
    assert SeenPhotos().count(Photos.of([Photo("a", "a", "test")])) == SeenCount(n=1, train=0, val=0, complete=False)


def test_more_photos_than_a_header_holds_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = seen((1, 2)), seen((3, 4))
    monkeypatch.setattr(module, "_MOST", 3)
    assert one | two == SeenPhotos() == seen((1, 2, 3, 4))


@pytest.mark.parametrize("text", ["AAAA", "é", "AAAAAAAAAAA", "not base64!!"])
def test_digests_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="base64 of 8 bytes a photo"):
        TypeAdapter(SeenPhotos).validate_python({"train": text})


def test_photos_are_counted_by_split() -> None:
    assert photos_by_split(Photos.of(photos("train", 1, 2) + photos("test", 3))) == {"train": 2, "val": 0, "test": 1}
    assert np.array_equal(Photos.of([Photo("a", "a", "train")]).prefixes, [0])
