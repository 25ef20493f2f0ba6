import os

from bnlab.errors import DivergedError, PhotoError, did_you_mean, printable


def test_printable_is_one_line_of_text() -> None:
    assert printable("a b 'c' 百合.jpg") == "a b 'c' 百合.jpg"
    assert printable("new\nline\x1b[31m") == r"new\nline\x1b[31m"
    assert printable(os.fsdecode(b"\xff.jpg")) == r"\udcff.jpg"


def test_did_you_mean() -> None:
    assert did_you_mean("epoch", ["epochs", "size"]) == "did you mean 'epochs'?"
    assert did_you_mean("qqq", ["epochs", "size"]) == "there are epochs, size"


def test_errors_say_what_where_and_the_remedy() -> None:
    assert str(PhotoError("a\n.jpg", "it is empty")) == (
        r"a\n.jpg cannot be used, it is empty: replace the photo or take it away"
    )
    assert DivergedError("a", "b").exit_status == 1
