"""What a network's options may be, in plain words that a recipe and a classifier file can hold.

Some take a number after a colon: "ghost:16", "whitening:8", "gaussian:0.05".
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from bnlab import norm
from bnlab.errors import UsageError, did_you_mean, printable

MakeNorm = Callable[[int], nn.Module]
"""from a number of channels to a layer for N x C x H x W (or N x C, behind fully connected layers)"""
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


def choose_norm(name: str, *, eps: float, momentum: float | None) -> tuple[MakeNorm, MakeNorm] | None:
    """Makers of the layer for N x C x H x W and for N x C; None for no normalisation.

    "ghost:16" normalises by parts of at most 16 examples (32 unless said), "whitening:8" whitens groups of at most 8
    channels (16 unless said): the largest size up to that which divides a layer's channels.

    Raises:
        UsageError: there is no normalisation of that name, or its number cannot be.
    """
    word, number = split_number("norm", name, NORMS, with_number=("ghost", "whitening"))
    if number is not None and not (number >= 1 and number.is_integer()):
        raise UsageError(
            f"norm {printable(name)} cannot be", f"after the colon comes a whole number of at least 1, as in {word}:16"
        )
    size = int(number or 0)
    common: dict[str, Any] = {"eps": eps, "momentum": momentum}
    match word:
        case "none":
            return None
        case "batch":
            return partial(norm.BatchNorm2d, **common), partial(norm.BatchNorm1d, **common)
        case "sync":
            return partial(norm.SyncBatchNorm, **common), partial(norm.SyncBatchNorm, **common)
        case "ghost":
            common["ghost_size"] = size or 32
            return partial(norm.GhostBatchNorm2d, **common), partial(norm.GhostBatchNorm1d, **common)
    return (
        lambda channels: norm.Whitening2d(channels, groups=_groups(channels, size or 16), **common),
        lambda channels: norm.Whitening1d(channels, groups=_groups(channels, size or 16), **common),
    )


def choose_activation(name: str) -> MakeActivation:
    """The maker of an activation.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in ACTIVATIONS:
        raise UsageError(f"no activation is called '{printable(name)}'", did_you_mean(str(name), list(ACTIVATIONS)))
    return ACTIVATIONS[name]


def split_number(
    option: str, text: str, known: tuple[str, ...], *, with_number: tuple[str, ...]
) -> tuple[str, float | None]:
    """The word and the number after its colon, if there is one.

    Raises:
        UsageError: the word is not known, takes no number, or what follows the colon is none.
    """
    word, colon, number = str(text).partition(":")
    if word not in known:
        raise UsageError(f"no {option} is called '{printable(text)}'", did_you_mean(word, list(known)))
    if not colon:
        return word, None
    if word not in with_number:
        raise UsageError(f"{option} {word} takes no number ('{printable(text)}')", f"say {word}")
    try:
        return word, float(number)
    except ValueError:
        raise UsageError(
            f"{option} '{printable(text)}' has no number after the colon", f"say, for example, {word}:16"
        ) from None


def _groups(channels: int, largest: int) -> int:
    """How many groups of the largest size up to `largest` that divides the channels."""
    return channels // next(size for size in range(min(largest, channels), 0, -1) if channels % size == 0)
