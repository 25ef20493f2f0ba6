"""Every error that bnlab raises on purpose. Each is one line: what is wrong, where, and what to do about it.

An interruption (Ctrl-C) is `Interrupted`, a KeyboardInterrupt, so that `except Exception` does not swallow it.
"""

import re
import shlex
from difflib import get_close_matches
from os import PathLike


class BnlabError(Exception):
    """Base of bnlab's errors. `problem` is what is wrong and where, `remedy` what to do; both are on one line.

    They reach users of the command line and of the Python API. So they call an option or a key of the recipe by its
    name without dashes, such as learning_rate. A command line is given as a whole: `bnlab train DATA --init FILE`.
    """

    exit_status = 2

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


class UsageError(BnlabError):
    """An option or a setting is not valid."""


class ShapeError(UsageError, ValueError):
    """A layer or a network gets an input of a shape that it does not take."""


class RecipeError(UsageError):
    """A recipe has an unknown key or a value out of range."""


class DataError(BnlabError):
    """A folder or a list of photos cannot be used."""


class PhotoError(DataError):
    """One photo cannot be used; `path` names it and `reason` says why."""

    def __init__(self, path: str, reason: str, remedy: str = "replace or remove the photo") -> None:
        super().__init__(f"{printable(path)} cannot be used, {reason}", remedy)
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["PhotoError"], tuple[str, str, str]]:
        return type(self), (self.path, self.reason, self.remedy)  # the arguments of __init__, for pickle


class ClassifierError(BnlabError):
    """A classifier file cannot be read, or does not fit its use."""


class RunError(BnlabError):
    """A run folder is in use, is missing, or cannot be resumed."""


class StorageError(BnlabError):
    """The disk is full or cannot be written to. Earlier files are untouched."""


class OutOfMemoryError(BnlabError):
    """The batch does not fit into the memory of the device."""


class DivergedError(BnlabError):
    """The loss became NaN or infinite: the settings were valid, but the training failed."""

    exit_status = 1


class Interrupted(KeyboardInterrupt):
    """The user pressed Ctrl-C (or the system asked to stop). The message says what was saved and how to continue."""


def printable(path: str | PathLike[str]) -> str:
    """The path as one line that any terminal and file can hold: control characters and undecodable bytes escaped."""
    text = str(path).encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def without_folders(text: str | PathLike[str]) -> str:
    """A path or KEY=PATH without the folders: "init=a.safetensors" for "init=/home/me/a.safetensors".

    Folders are private, and classifier files and pages are passed on.
    """
    key, value = re.fullmatch(r"([\w-]+=)?(.*)", str(text), re.DOTALL).groups("")  # type: ignore[union-attr]
    return key + (re.split(r"[/\\]", value.rstrip("/\\"))[-1] or value)


def quoted(path: str | PathLike[str]) -> str:
    """The path as a word of a shell command."""
    return shlex.quote(printable(path))


def plural(number: int, what: str) -> str:
    """A count with its noun: "1 photo", "2 photos", "2 classes"."""
    ending = "" if number == 1 else "es" if what.endswith("s") else "s"
    return f"{number} {what}{ending}"


def did_you_mean(word: str, known: list[str]) -> str:
    """A remedy for an unknown word: "did you mean 'epochs'?" if a known word is near, else the list of all."""
    near = get_close_matches(word, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
