"""Adds up what is measured of the inputs of each layer over many batches, in memory that does not grow with them.

The arithmetic of a batch is done for all layers at once: the channels of the L layers lie one after the other in arrays
of T = C1 + C2 + ... channels. Until a batch ends, what was measured stays on the device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlab.health.evidence import Floats, Sample
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.norm import moments
from bnlab.norm.freeze import Freezable
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

GROUPS = 32
EXACT = 32752.0  # half of the largest float16
_IMAGE_BATCHES = 16  # whose images are measured one by one, which is enough for a variance


class _Sums:
    """What is added up over the batches."""

    def __init__(self) -> None:
        self.channels: dict[str, slice] = {}  # of each layer, in the order in which they are first seen
        self.counts = np.zeros((GROUPS, 0))  # groups x L: values of each channel
        self.groups = np.zeros((2, GROUPS, 0))  # 2 x groups x T: means and scatters
        # L: values of each channel in the first batch, in all batches and in the last one; the number of batches; the
        # number of images, less one for each batch, whose means were measured
        self.usual, self.total, self.last, self.batches, self.images = self.of_layers = np.zeros((5, 0))
        # T: the mean of the first batch; sums of the batches' distances from it and of their squares, weighted by their
        # values; the sum of the squared differences of successive ones; the last distance; the squared distances of
        # the means of images from the batch's. Distances from the first mean keep the sums exact.
        self.first, self.off, self.squares, self.successive, self.previous, self.spread = self.of_channels = np.zeros(
            (6, 0)
        )

    def make_room(self, sizes: Mapping[str, int]) -> None:
        """For layers with so many channels, where they are new."""
        new = {name: size for name, size in sizes.items() if name not in self.channels}
        if not new:
            return
        at = self.of_channels.shape[1]
        for name, size in new.items():
            self.channels[name] = slice(at, at + size)
            at += size
        self.counts, self.of_layers = _lengthened(self.counts, len(new)), _lengthened(self.of_layers, len(new))
        self.groups = _lengthened(self.groups, sum(new.values()))
        self.of_channels = _lengthened(self.of_channels, sum(new.values()))
        self.usual, self.total, self.last, self.batches, self.images = self.of_layers
        self.first, self.off, self.squares, self.successive, self.previous, self.spread = self.of_channels

    def where(self, names: Sequence[str]) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
        """The numbers of the layers; those of their channels; and for each of these the place of its layer in names."""
        order = {name: number for number, name in enumerate(self.channels)}
        layers = np.array([order[name] for name in names], dtype=np.intp)
        slices = [self.channels[name] for name in names]
        channels = np.concatenate([np.arange(s.start, s.stop) for s in slices])
        return layers, channels, np.repeat(np.arange(len(names)), [s.stop - s.start for s in slices])

    def add(self, names: Sequence[str], count: Floats, mean: Floats, scatter: Floats, group: int) -> None:
        """Add one batch: the values of each channel (L), means and scatters (T) of the named layers."""
        layers, channels, of = self.where(names)
        # of the group, by Chan, Golub & LeVeque 1979
        old, new = self.counts[group, layers], self.counts[group, layers] + count
        apart = mean - self.groups[0, group, channels]
        self.groups[0, group, channels] += apart * (count / new)[of]
        self.groups[1, group, channels] += scatter + apart**2 * (old * count / new)[of]
        self.counts[group, layers] = new
        # of the batch means
        begins = self.batches[layers] == 0
        self.usual[layers] = np.where(begins, count, self.usual[layers])
        self.first[channels] = np.where(begins[of], mean, self.first[channels])
        off = mean - self.first[channels]
        self.off[channels] += count[of] * off
        self.squares[channels] += count[of] * off**2
        last = self.last[layers]  # 0 before the first batch
        self.successive[channels] += (count * last / (count + last))[of] * (off - self.previous[channels]) ** 2
        self.previous[channels] = off
        self.last[layers] = count
        self.total[layers] += count
        self.batches[layers] += 1

    def add_images(self, names: Sequence[str], means: Floats) -> None:
        """Add the means of a batch's images, N x T."""
        layers, channels, _ = self.where(names)
        self.spread[channels] += ((means - means.mean(0)) ** 2).sum(0)
        self.images[layers] += len(means) - 1


def _lengthened(array: Floats, by: int) -> Floats:
    return np.concatenate([array, np.zeros((*array.shape[:-1], by))], axis=-1)


@dataclass
class Recorder:
    """Adds up what is measured of each layer. Uses of a layer within a batch are merged."""

    layers: Mapping[str, nn.Module]
    images: bool
    """whether to measure the means of single images, which says whether the batches are alike"""
    single: dict[str, int] = field(default_factory=dict)
    """how many batches had one value for each channel, by layer; the caller counts them"""
    now: dict[str, list[Moments]] = field(default_factory=dict)
    now_images: dict[str, Tensor] = field(default_factory=dict)
    now_ranges: dict[str, list[Tensor]] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    covariances: dict[str, Moments] = field(default_factory=dict)
    number: int = 0
    sums: _Sums = field(default_factory=_Sums)

    def add(self, name: str, x: Tensor, found: Moments) -> None:
        """Note the input of a layer, N x C x ..., and its moments."""
        self.now.setdefault(name, []).append(found)
        if isinstance(layer := self.layers[name], Whitening):
            covariance = layer.measure(x).cpu()
            self.covariances[name] = moments.merge([*filter(None, [self.covariances.get(name)]), covariance])
        x = x.detach()
        last = x.movedim(1, -1)  # N x ... x C
        in_rows = last.is_contiguous()
        bound = found.mean.abs().max() + found.scatter.max().sqrt() if found.mean.device.type == "cpu" else None
        if bound is not None and bound < EXACT:  # a look at all values takes longer
            self.now_ranges.setdefault(name, []).append(bound)
        else:
            self.now_ranges.setdefault(name, []).extend(torch.aminmax(last if in_rows else x))  # else it copies x
        if self.images and self.number < _IMAGE_BATCHES and name not in self.now_images:
            if x.ndim > 2:
                x = last.flatten(1, -2).mean(1) if in_rows else x.flatten(2).mean(2)
            self.now_images[name] = x  # N x C

    def end_batch(self, size: int) -> None:
        """The batch had so many images."""
        merged = {name: parts[0] if len(parts) == 1 else moments.merge(parts) for name, parts in self.now.items()}
        images, ranges = self.now_images, self.now_ranges
        group = self.number % GROUPS
        self.now, self.now_images, self.now_ranges = {}, {}, {}
        self.number += 1
        if not merged:
            return
        for name, extremes in zip(ranges, _gathered(ranges), strict=True):
            largest = np.abs(extremes).max()
            self.largest[name] = max(self.largest.get(name, 0.0), np.inf if np.isnan(largest) else float(largest))
        mean = torch.cat([one.mean for one in merged.values()]).cpu().numpy()  # T
        scatter = torch.cat([one.scatter for one in merged.values()]).cpu().numpy()  # T
        ends = np.cumsum([len(one.mean) for one in merged.values()])
        finite = np.logical_and.reduceat(np.isfinite(mean) & np.isfinite(scatter), ends - np.diff(ends, prepend=0))
        names = [name for name, good in zip(merged, finite, strict=True) if good]
        self.largest |= {name: np.inf for name, good in zip(merged, finite, strict=True) if not good}
        if not names:
            return
        self.sums.make_room({name: len(merged[name].mean) for name in names})
        kept = np.repeat(finite, np.diff(ends, prepend=0))
        count = np.array([merged[name].count for name in names], dtype=float)
        self.sums.add(names, count, mean[kept], scatter[kept], group)
        alike = [n for n in names if n in images and len(images[n]) == size > 1]  # of other rows, an image has several
        if alike:
            self.sums.add_images(alike, torch.cat([images[n].double() for n in alike], 1).cpu().numpy())

    @property
    def not_finite(self) -> frozenset[str]:
        """The layers that got values that are not finite."""
        return frozenset(name for name, value in self.largest.items() if np.isinf(value))

    def samples(self) -> dict[str, Sample]:
        sums, found = self.sums, dict[str, Sample]()
        for number, (name, own) in enumerate(sums.channels.items()):
            whole = self._whole(number, own)
            k = int(sums.batches[number])
            # for batches of the size of the first one, from batches that may differ in size
            scatter = (sums.squares[own] - sums.off[own] ** 2 / sums.total[number]).clip(min=0)
            pairs = (k - 1) * sums.usual[number] if k > 1 else np.nan
            filled = sums.counts[:, number] > 0
            means, scatters = sums.groups[:, filled, own]
            stacked = np.stack([means, scatters / sums.counts[filled, number, None]], axis=1)
            images = sums.images[number]
            found[name] = Sample(
                count=whole.count,
                batches=k,
                mean=whole.mean.numpy(),
                variance=np.nan_to_num(whole.variance(unbiased=True).numpy(), nan=0.0),
                between=scatter / pairs,
                successive=sums.successive[own] / pairs,
                between_images=sums.spread[own] / images if images else None,
                groups=stacked,  # groups x 2 x C
                largest=self.largest[name],
            )
        return found

    def population(self, switch: StatisticsSwitch) -> dict[str, tuple[Tensor, Tensor]]:
        """The merged statistics of each layer that can hold them."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for number, (name, own) in enumerate(self.sums.channels.items()):
            like = switch.buffers[name].get("running_mean")
            whole = self._whole(number, own)
            layer = self.layers[name]
            if like is None or whole.count < 2 or isinstance(layer, _InstanceNorm):
                continue
            if isinstance(layer, Freezable) and layer.frozen:
                continue
            variance = self.covariances[name].variance(unbiased=True) if name in self.covariances else None
            variance = whole.variance(unbiased=True) if variance is None else variance
            found[name] = whole.mean.to(like), variance.to(like)
        return found

    def _whole(self, number: int, own: slice) -> Moments:
        """The moments of all batches, of the layer with that number and those channels."""
        counts = self.sums.counts[:, number]
        means, scatters = torch.from_numpy(self.sums.groups[:, counts > 0, own])  # each groups x C
        parts = zip(counts[counts > 0], means, scatters, strict=True)
        return moments.merge([Moments(int(n), mean, scatter) for n, mean, scatter in parts])


def _gathered(values: Mapping[str, Sequence[Tensor]]) -> list[Floats]:
    """The scalars of each layer, fetched from the device at once."""
    flat = torch.stack([x.double() for scalars in values.values() for x in scalars]).cpu().numpy()
    return np.split(flat, np.cumsum([len(scalars) for scalars in values.values()])[:-1])
