"""Runs all images through the network: by running, by batch and by population statistics.

The images are read twice. The first time, each batch is run twice: by the running statistics, as in evaluation, and by
batch statistics, as in training but without dropout; both times the inputs of the layers are measured. The second time,
the network normalises by the population statistics that the batches gave. Memory does not grow with the number of
batches, but for the scores.

All arithmetic of a batch is done for all layers at once: their channels lie one after the other in one array of
T = C1 + C2 + ... channels.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlab.health.batches import Batch, Batches
from bnlab.health.evidence import Floats, Sample, Scores
from bnlab.health.gather.positives import counting
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.norm import moments, own_forward
from bnlab.norm.freeze import Freezable
from bnlab.norm.layers import StatisticsMode
from bnlab.norm.moments import Moments
from bnlab.norm.recalibrate import evaluation_mode
from bnlab.norm.whitening import Whitening
from bnlab.progress import Task

GROUPS = 32
_BatchNormBase = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Passes:
    """What the passes over all images gave."""

    scores: Scores | None
    evaluation: Mapping[str, Sample]
    """the inputs of each layer where all normalise by their running statistics"""
    batch: Mapping[str, Sample]
    """the inputs of each layer where all normalise by batch statistics"""
    population: Mapping[str, tuple[Tensor, Tensor]]
    """population means and variances by layer, as its buffers store them"""
    images: int
    batch_sizes: tuple[int, ...]
    labels: Tensor | None
    """of all images, where each image has one"""
    single: Mapping[str, int]
    """how many batches had one value for each channel at a layer, by name, where there was one"""
    positives: Mapping[str, Floats]
    """by layer, how many outputs of each channel are not at most 0 in evaluation; NaN: not counted"""


@torch.no_grad()
def run_passes(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    task: Task,
    count: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Passes:
    """Run all images through the network as the file's docstring says. The caller restores the model.

    `count` gives channels whose positive outputs are counted, by layer.
    """
    switch = StatisticsSwitch(layers)
    evaluation, batch = Recorder(layers, images=True), Recorder(layers, images=False)
    positives = {name: np.where(channels, 0.0, np.nan) for name, channels in (count or {}).items() if channels.any()}
    running, by_batch, again = _ScoreList(), _ScoreList(), _ScoreList()
    sizes: list[int] = []
    labels: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(_single_values_pass(switch))
        with (
            measuring(layers, switch, evaluation, batch),
            counting(layers, positives, lambda: switch.which == "running"),
        ):
            for one in batches:
                switch.to("running")
                running.add(batches, network, one)
                evaluation.end_batch(len(one))
                switch.to("batch")
                by_batch.add(batches, network, one)
                batch.end_batch(len(one))
                sizes.append(len(one))
                if one.labels is not None and one.labels.ndim == 1:
                    labels.append(one.labels.cpu())
                task.advance(2 * len(one))
        evaluated, measured = evaluation.samples(), batch.samples()
        population = batch.population(switch)
        if population:
            switch.to("population", population)
            for one in batches:
                again.add(batches, network, one)
                task.advance(len(one))
        switch.to("running")
    scores = Scores(running=running.all(), batch=by_batch.all(), population=again.all() if population else None)
    return Passes(
        scores=None if scores.running is None else scores,
        evaluation=evaluated,
        batch=measured,
        population=population,
        images=sum(sizes),
        batch_sizes=tuple(sizes),
        labels=torch.cat(labels) if sum(map(len, labels)) == sum(sizes) else None,
        single=batch.single,
        positives=positives,
    )


class _ScoreList:
    """The scores of one way to run the network."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, batches: Batches, network: nn.Module, batch: Batch) -> None:
        score = batches.score(batches.call(network, batch), batch)
        if score is not None:
            self.parts.append(score)

    def all(self) -> Floats | None:
        return torch.cat(self.parts).numpy() if self.parts else None


@contextmanager
def _single_values_pass(switch: StatisticsSwitch) -> Iterator[None]:
    """Let layers without statistics take a batch with one value for each channel, which torch refuses also in
    evaluation. The value is then its own mean.
    """
    without = [n for n, layer in switch.layers.items() if isinstance(layer, _BatchNormBase)]
    without = [name for name in without if switch.buffers[name].get("running_mean") is None]

    def hook(name: str, layer: nn.Module, args: Any) -> None:
        layer._buffers.update(switch.buffers[name])
        if args and args[0].numel() == args[0].shape[1]:
            mean = args[0].detach().flatten()
            layer._buffers.update(running_mean=mean, running_var=torch.ones_like(mean))
            if isinstance(layer, StatisticsMode):
                layer._statistics = "running"  # until `to` sets it for the next batch

    with ExitStack() as stack:
        for name in without:
            layer = switch.layers[name]
            handle = layer.register_forward_pre_hook(lambda module, args, name=name: hook(name, module, args))
            stack.callback(handle.remove)
        yield


@contextmanager
def measuring(
    layers: Mapping[str, nn.Module], switch: StatisticsSwitch, evaluation: "Recorder", batch: "Recorder"
) -> Iterator[None]:
    """Within this context, each forward measures the inputs of the layers."""
    own = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, _BatchNormBase) and own_forward.normalises(layer) != "its input"
    }

    def hook(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if name in own:
            inputs = own_forward.normalised_inputs(own[name], *args, **kwargs)
            x = inputs[0] if inputs else x
        if not x.numel():
            return
        if switch.which == "running":
            evaluation.add(name, x, moments.measure(x))
            return
        found = moments.measure(x)
        batch.add(name, x, found)
        if found.count == 1:
            batch.single[name] = batch.single.get(name, 0) + 1
            layer._buffers.update(switch.buffers[name])
        elif name in switch.replaces and not (isinstance(layer, Freezable) and layer.frozen):
            switch.replace(name, found)

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: hook(name, module, args, kwargs), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        yield


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
