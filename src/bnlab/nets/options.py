"""The normalisations and activations of networks, by the names that a recipe and a classifier file hold.

Some names take a number after a colon: "ghost:16", "whitening:8", "gaussian:0.05".
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import nn

from bnlab import norm
from bnlab.errors import UsageError, did_you_mean, printable

MakeNorm = Callable[[int], nn.Module]
"""Makes a layer of so many channels, for N x C x H x W (or N x C, after fully connected layers)."""
MakeActivation = Callable[[], nn.Module]

NORMS = ("none", "batch", "sync", "ghost", "whitening")
ACTIVATIONS: Mapping[str, MakeActivation] = {
    "relu": partial(nn.ReLU, inplace=True),
    "leaky_relu": partial(nn.LeakyReLU, 0.01, inplace=True),
    "elu": partial(nn.ELU, inplace=True),
    "gelu": nn.GELU,
    "silu": partial(nn.SiLU, inplace=True),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "none": nn.Identity,
}


def choose_norm(name: str, *, eps: float, momentum: float | None) -> tuple[MakeNorm | None, MakeNorm | None]:
    """The functions that make the layers for N x C x H x W and for N x C; (None, None) for "none".

    "ghost:16" normalises by parts of at most 16 examples (default: 32). "whitening:8" whitens groups of at most 8
    channels (default: 16): of the sizes up to that, the largest that divides a layer's channels.

    Raises:
        UsageError: no normalisation has that name, or its number is not valid.
    """
    word, number = split_number("norm", name, NORMS, with_number=("ghost", "whitening"))
    if number is not None and not (number >= 1 and number.is_integer()):
        raise UsageError(
            f"norm {printable(name)} is not valid", f"use a whole number of at least 1 after the colon, as in {word}:16"
        )
    common: dict[str, Any] = {"eps": eps, "momentum": momentum}
    match word:
        case "none":
            return None, None
        case "batch":
            return partial(norm.BatchNorm2d, **common), partial(norm.BatchNorm1d, **common)
        case "sync":
            return partial(norm.SyncBatchNorm, **common), partial(norm.SyncBatchNorm, **common)
        case "ghost":
            common["ghost_size"] = int(number or 32)
            return partial(norm.GhostBatchNorm2d, **common), partial(norm.GhostBatchNorm1d, **common)
    size = int(number or 16)
    return (
        lambda channels: norm.Whitening2d(channels, groups=_groups(channels, size), **common),
        lambda channels: norm.Whitening1d(channels, groups=_groups(channels, size), **common),
    )


def check_name(kind: str, name: object, known: Collection[str]) -> None:
    """Raise UsageError unless the name is known; its message calls what is named a `kind`."""
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"no {kind} is called '{printable(str(name))}'", did_you_mean(str(name), list(known)))


def split_number(
    option: str, text: str, known: tuple[str, ...], with_number: tuple[str, ...]
) -> tuple[str, float | None]:
    """The word and the number after its colon, or None without a colon.

    Raises:
        UsageError: the word is not known, takes no number, or has no number after the colon.
    """
    word, colon, number = str(text).partition(":")
    if word not in known:
        raise UsageError(f"no {option} is called '{printable(text)}'", did_you_mean(word, list(known)))
    if not colon:
        return word, None
    if word not in with_number:
        raise UsageError(f"{option} {word} takes no number ('{printable(text)}')", f"use {word}")
    try:
        return word, float(number)
    except ValueError:
        raise UsageError(
            f"{option} '{printable(text)}' has no number after the colon", f"use, for example, {word}:16"
        ) from None


def _groups(channels: int, largest: int) -> int:
    return channels // next(size for size in range(min(largest, channels), 0, -1) if channels % size == 0)
