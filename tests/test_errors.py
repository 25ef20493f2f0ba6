import ast
import os
import pickle
import re
from pathlib import Path

import pytest

import bnlab
from bnlab.errors import DivergedError, PhotoError, did_you_mean, plural, printable, quoted, without_folders


def test_printable_is_one_line_of_text() -> None:
    assert printable("a b 'c' 百合.jpg") == "a b 'c' 百合.jpg"
    assert printable("new\nline\x1b[31m") == r"new\nline\x1b[31m"
    assert printable(os.fsdecode(b"\xff.jpg")) == r"\udcff.jpg"


def test_did_you_mean() -> None:
    assert did_you_mean("epoch", ["epochs", "size"]) == "did you mean 'epochs'?"
    assert did_you_mean("qqq", ["epochs", "size"]) == "there are epochs, size"


def test_errors_say_what_where_and_the_remedy() -> None:
    assert str(PhotoError("a\n.jpg", "it is empty")) == (
        r"a\n.jpg cannot be used, it is empty: replace or remove the photo"
    )
    assert DivergedError("a", "b").exit_status == 1


def test_a_photo_error_passes_between_processes() -> None:
    error = pickle.loads(pickle.dumps(PhotoError("a.jpg", "it is empty", "look at it")))
    assert (error.path, error.reason, error.remedy) == ("a.jpg", "it is empty", "look at it")


@pytest.mark.parametrize(("number", "text"), [(0, "0 photos"), (1, "1 photo"), (2, "2 photos")])
def test_plural(number: int, text: str) -> None:
    assert plural(number, "photo") == text
    assert plural(number, "class") == text.replace("photos", "classes").replace("photo", "class")


@pytest.mark.parametrize(
    ("text", "reduced"),
    [
        ("/home/anna/my photos/", "my photos"),
        ("../b c/a.safetensors", "a.safetensors"),
        ("init=~/a.safetensors", "init=a.safetensors"),
        ("--init=/a=b/c", "--init=c"),
        ("/a=b/c", "c"),
        ("C:\\anna\\x.png", "x.png"),
        ("a\nb/c\nd", "c\nd"),
        ("momentum=0.8", "momentum=0.8"),
        ("--resume", "--resume"),
        ("..", ".."),
        ("", ""),
    ],
)
def test_folders_are_left_out(text: str, reduced: str) -> None:
    assert without_folders(text) == reduced


def test_quoted_is_a_word_of_a_shell() -> None:
    assert quoted("my flowers") == "'my flowers'"
    assert quoted("flowers") == "flowers"


def test_messages_call_options_by_their_names_without_dashes() -> None:
    """They reach users of the Python API too, who have no --learning-rate. A whole command may have dashes."""
    root, found, read = Path(bnlab.__file__).parent, [], 0
    for path in sorted(root.rglob("*.py")):
        # What only the command line says: its verbs and options, and what is wrong with the words after --set.
        if path.parent.name == "cli" or path.name in ("__main__.py", "options.py", "config.py"):
            continue
        tree, read = ast.parse(path.read_text("utf-8")), read + 1
        for node in ast.walk(tree):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                node.value.value = None  # a docstring
        within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            parts = node.values if isinstance(node, ast.JoinedStr) else [] if id(node) in within else [node]
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            words = re.sub(r"bnlab [a-z]+ [^)`,;:]*", "", text)  # without commands
            found += [f"{path.relative_to(root)}: {text}"] if re.search(r"(^|\W)--[a-z]", words) else []
    assert read > 100
    assert not found
