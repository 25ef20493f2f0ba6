"""The usual ways to turn photos into a network's input, and the changes from one into another."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
_IMAGENET = (0.485, 0.456, 0.406)
_TOLERANCE = 0.02  # beyond black and white, since interpolation may overshoot


@dataclass(frozen=True)
class Convention:
    """x = (u - mean) / std for pixels u from 0 to 1, for each colour."""

    name: str
    mean: Floats
    std: Floats


def _convention(name: str, mean: Sequence[float] | float, std: Sequence[float] | float) -> Convention:
    return Convention(
        name, np.broadcast_to(np.asarray(mean, np.float64), 3), np.broadcast_to(np.asarray(std, np.float64), 3)
    )


CONVENTIONS = (
    _convention("pixels from 0 to 1", 0, 1),
    _convention("pixels from 0 to 255", 0, 1 / 255),
    _convention("pixels from 0 to 1 with ImageNet's mean and std", _IMAGENET, (0.229, 0.224, 0.225)),
    _convention("pixels from -1 to 1, (value - 127.5) / 127.5", 0.5, 0.5),
    _convention("(value - 127) / 128", 127 / 255, 128 / 255),
    _convention("pixels from 0 to 255 minus ImageNet's mean", _IMAGENET, 1 / 255),
)


@dataclass(frozen=True)
class Change:
    """x times scale plus offset, after red and blue are swapped, or not."""

    name: str
    swapped: bool
    scale: Floats
    offset: Floats

    def apply(self, x: Tensor) -> Tensor:
        """N x 3 x H x W"""
        x = x.flip(1) if self.swapped else x
        scale, offset = (x.new_tensor(values).view(1, 3, 1, 1) for values in (self.scale, self.offset))
        return x * scale + offset

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for changes that are all but the same."""
        return self.swapped, *np.round(np.log(self.scale), 2), *np.round(self.offset / (1 + self.scale), 2)

    @property
    def is_none(self) -> bool:
        return not self.swapped and bool((abs(self.scale - 1) < 0.01).all() and (abs(self.offset) < 0.01).all())


def describe_pixels(images: Sequence[Tensor]) -> tuple[Floats, Floats]:
    """The smallest and the largest value of each colour, 3 each, of images N x 3 x H x W."""
    low = np.min([x.amin((0, 2, 3)).double().cpu().numpy() for x in images], axis=0)
    return low, np.max([x.amax((0, 2, 3)).double().cpu().numpy() for x in images], axis=0)


def changes(
    values: tuple[Floats, Floats], mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[str, list[Change]]:
    """What images with such smallest and largest values look like, and the changes from that into other conventions.

    With the mean and std that the caller says were used (of pixels from 0 to 1, or from 0 to 255), from these alone. If
    no convention explains the values, the changes are to apply a convention, or to undo it, once.
    """
    if mean is not None or std is not None:
        means = np.broadcast_to(np.asarray(0 if mean is None else mean, np.float64), 3)
        stds = np.broadcast_to(np.asarray(1 if std is None else std, np.float64), 3)
        unit, other = (255, 1) if max(means.max(), stds.max()) > 2 else (1, 255)
        usual = Convention("images with the given mean and std", means / unit, stds / unit)
        mistaken = Convention(
            f"pixels from 0 to {other} with the given mean and std, which are of pixels from 0 to {unit}",
            means / other,
            stds / other,
        )
        sources = [mistaken] if _explains(mistaken, values) and not _explains(usual, values) else [usual]
    else:
        sources = sorted((c for c in CONVENTIONS if _explains(c, values)), key=lambda c: _unused(c, values))
    found: dict[tuple[object, ...], Change] = {}
    for swapped in (False, True):
        order = slice(None, None, -1 if swapped else 1)
        suffix = ", with red and blue swapped" if swapped else ""
        possible = [Change(f"the same{suffix}", swapped, np.ones(3), np.zeros(3))]
        for target in CONVENTIONS:
            for source in sources:
                scale = source.std[order] / target.std
                offset = (source.mean[order] - target.mean) / target.std
                possible.append(Change(target.name + suffix, swapped, scale, offset))
            if not sources:
                forward = Change(
                    f"the same as {target.name}{suffix}", swapped, 1 / target.std, -target.mean / target.std
                )
                undone = Change(f"the same before {target.name}{suffix}", swapped, target.std + 0.0, target.mean + 0.0)
                possible += [forward, undone]
        for change in possible:
            if not change.is_none:
                found.setdefault(change.key, change)
    return sources[0].name if sources else "no usual convention", [*found.values()]


def _explains(convention: Convention, values: tuple[Floats, Floats]) -> bool:
    """Whether the pixels before it would lie between black and white, and come near both."""
    low, high = (v * convention.std + convention.mean for v in values)
    inside = low.min() >= -_TOLERANCE and high.max() <= 1 + _TOLERANCE
    return bool(inside and low.min() < 0.3 and high.max() > 0.7)


def _unused(convention: Convention, values: tuple[Floats, Floats]) -> float:
    """How much of the way from black to white the pixels leave out."""
    low, high = (v * convention.std + convention.mean for v in values)
    return float(np.abs(low).sum() + np.abs(1 - high).sum())
