"""Adds up what is measured of the inputs of each layer over many batches, in memory that does not grow with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlab.health.evidence import Floats, Sample
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.norm import moments
from bnlab.norm.freeze import Freezable
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

GROUPS = 32


@dataclass
class Recorder:
    """Adds up what is measured of each layer. Uses of a layer within a batch are merged."""

    layers: Mapping[str, nn.Module]
    images: bool
    """whether to measure the means of single images, which says whether the batches are alike"""
    single: dict[str, int] = field(default_factory=dict)
    now: dict[str, list[Moments]] = field(default_factory=dict)
    now_images: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    groups: dict[str, list[Moments | None]] = field(default_factory=dict)
    weights: dict[str, tuple[float, float, int, float]] = field(default_factory=dict)
    """values of the first batch and of all, the number of batches, and the values of the last one"""
    sums: dict[str, Floats] = field(default_factory=dict)
    image_sums: dict[str, Floats] = field(default_factory=dict)
    covariances: dict[str, Moments] = field(default_factory=dict)
    number: int = 0

    def add(self, name: str, x: Tensor, found: Moments) -> None:
        self.now.setdefault(name, []).append(found.cpu())
        if isinstance(layer := self.layers[name], Whitening):
            covariance = layer.measure(x).cpu()
            self.covariances[name] = moments.merge([*filter(None, [self.covariances.get(name)]), covariance])
        low, high = torch.aminmax(x.detach())
        largest = float(torch.maximum(low.abs(), high.abs()).nan_to_num(nan=torch.inf))
        self.largest[name] = max(self.largest.get(name, 0.0), largest)
        if self.images and name not in self.now_images:
            positions = list(range(2, x.ndim))
            means = (x.mean(positions) if positions else x).double().cpu()  # N x C
            self.now_images[name] = means

    def end_batch(self, size: int) -> None:
        """The batch had so many images."""
        for name, parts in self.now.items():
            found = moments.merge(parts)
            if not (found.mean.isfinite().all() and found.scatter.isfinite().all()):
                self.largest[name] = float("inf")
                continue
            group = self.groups.setdefault(name, [None] * GROUPS)
            which = self.number % GROUPS
            group[which] = moments.merge([*filter(None, [group[which]]), found])
            # weighted sums of the batch means: w * mean, w * mean^2, and of the squared successive differences
            mean, w = found.mean.numpy(), float(found.count)
            base = self.sums.setdefault(name, np.concatenate([mean[None], np.zeros((4, len(mean)))]))
            off = mean - base[0]  # from the first batch's, which keeps the sums exact
            base[1] += w * off
            base[2] += w * off**2
            usual, total, k, last = self.weights.get(name, (w, 0.0, 0, 0.0))
            base[3] += w * last / (w + last) * (off - base[4]) ** 2  # nothing for the first batch, whose last is 0
            base[4] = off
            self.weights[name] = usual, total + w, k + 1, w
            images = self.now_images.get(name)
            if images is not None and len(images) == size > 1:  # of other rows, an image has several
                spread = (images - images.mean(0)).square().sum(0).numpy()
                row = self.image_sums.setdefault(name, np.zeros((2, len(mean))))
                row[0] += spread
                row[1] += len(images) - 1
        self.now, self.now_images = {}, {}
        self.number += 1

    @property
    def not_finite(self) -> frozenset[str]:
        """The layers that got values that are not finite."""
        return frozenset(name for name, value in self.largest.items() if np.isinf(value))

    def samples(self) -> dict[str, Sample]:
        found: dict[str, Sample] = {}
        for name, parts in self.groups.items():
            groups = [part for part in parts if part is not None]
            whole = moments.merge(groups)
            usual, total, k, _ = self.weights[name]
            _, first, second, successive, _ = self.sums[name]
            # for batches of the size of the first one, from batches that may differ in size
            scatter = (second - first**2 / total).clip(min=0)
            pairs = (k - 1) * usual if k > 1 else np.nan
            variance = whole.variance(unbiased=True).numpy()
            images = self.image_sums.get(name)
            stacked = np.stack([np.stack([g.mean.numpy(), g.variance(unbiased=False).numpy()]) for g in groups])
            found[name] = Sample(
                count=whole.count,
                batches=k,
                mean=whole.mean.numpy(),
                variance=np.nan_to_num(variance, nan=0.0),
                between=scatter / pairs,
                successive=successive / pairs,
                between_images=None if images is None else images[0] / np.maximum(images[1], 1),
                groups=stacked,  # groups x 2 x C
                largest=self.largest[name],
            )
        return found

    def population(self, switch: StatisticsSwitch) -> dict[str, tuple[Tensor, Tensor]]:
        """The merged statistics of each layer that can hold them."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, parts in self.groups.items():
            like = switch.buffers[name].get("running_mean")
            whole = moments.merge([part for part in parts if part is not None])
            layer = self.layers[name]
            if like is None or whole.count < 2 or isinstance(layer, _InstanceNorm):
                continue
            if isinstance(layer, Freezable) and layer.frozen:
                continue
            variance = self.covariances[name].variance(unbiased=True) if name in self.covariances else None
            variance = whole.variance(unbiased=True) if variance is None else variance
            found[name] = whole.mean.to(like), variance.to(like)
        return found
