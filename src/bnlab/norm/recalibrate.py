"""Population statistics, measured with the weights fixed: what inference should normalise by (paper, Alg. 2).

The running statistics are a moving average, over weights that changed under it, of the last few batches. Measured
anew ("PreciseBN"), every image counts the same, the variances of batches are merged with the distances of their means,
and nothing of earlier weights is left.

Three ways:
- in one pass: each layer normalises by its batch, as in training, and its input is measured;
- layer by layer: a layer is measured once all layers before it normalise by their population statistics, as they will
  in inference. Exact, and as many passes as there are layers, each ended when its layer is reached. (A layer that is
  used more than once stands behind itself; then it, and what lies between its uses, normalises by its batch.)
- to the letter of Alg. 2 (`as_paper`): in one pass, the batches' means and unbiased variances averaged.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import moments, passes
from bnlab.norm.models import unwrap_model
from bnlab.norm.modes import StatisticsMode, TooFewValuesError
from bnlab.norm.moments import Moments
from bnlab.norm.passes import BatchStream, Layer, Layers, Measurements
from bnlab.norm.whitening import Whitening

MEAN_OFF, VARIANCE_OFF = 0.1, 1.25  # standard deviations, and a factor: a channel beyond either counts as off


class NotFiniteError(ValueError):
    """`recalibrate` met values that are not finite, at the layer of this name."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer

    def __str__(self) -> str:
        return f"values that are not finite reach {self.layer}: nothing was changed"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured of one layer, and how far its statistics had been from that."""

    values: int
    """values of each channel, over all images and positions"""
    uses: int
    """how often a forward calls the layer; where that is more than once its uses share one set of statistics"""
    mean_off: float
    """the largest distance of a channel's old mean from the new one, in new standard deviations"""
    variance_off: float
    """the largest ratio of a channel's old variance to the new one, or the inverse where that is larger: 1 is none"""
    off_share: float
    """fraction of channels that were off by more than 0.1 standard deviations or a variance factor of 1.25"""


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What `recalibrate` did; images and batches are those of all processes."""

    images: int
    batches: int
    passes: int
    """how often the batches were gone through"""
    layers: dict[str, Measured]
    """by the layer's name, in the order in which a forward first calls them"""
    left: dict[str, str]
    """layers whose statistics were left as they were, with the reason"""


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    images: int | None = None,
    *,
    layer_by_layer: bool = False,
    as_paper: bool = False,
    forward: Callable[[nn.Module, Any], object] | None = None,
    group: dist.ProcessGroup | None = None,
) -> Recalibration:
    """Measure the population statistics of every batch normalisation and whitening layer, torch.nn's and bnlab's.

    They replace the layers' running statistics; `num_batches_tracked` becomes the number of batches. Until all is
    measured nothing is changed, so that after an error or an interruption the model is as it was. Afterwards so are
    training flags, momenta, hooks and torch's generators. Dropout is off. Frozen layers are left alone: bnlab's after
    `freeze()`, torch.nn's where they are in evaluation while other layers are in training.

    Across processes (torch.distributed), each with batches of its own, as many as it has, all end with the same
    numbers: those of all batches together. Every process of the group has to call it.

    Args:
        model: on any device; a DistributedDataParallel is looked into.
        batches: image tensors (N x ...), or tuples that begin with one, as a DataLoader gives them: of the images that
            inference will see the like of, so without augmentation, and shuffled, for in one pass each layer
            normalises by its batch. They are moved to the model's device.
        images: stop after the batch that reaches so many; None takes all. 1,000 to 10,000 suffice (Wu & Johnson 2021).
        layer_by_layer: the exact way; the batches are gone through many times, so no generator will do, and forwards
            are ended early, by an exception.
        as_paper: Alg. 2 to the letter, for batches of one size.
        forward: how the model is called with a batch, where it is not `model(images)`.
        group: the processes to measure with; None is all.

    Raises:
        NotFiniteError: values that are not finite reach a layer.
        TooFewValuesError: a layer gets a single value for each channel.
        ValueError: there is no batch; batches or options do not fit together; statistics do not fit into a buffer.
    """
    if layer_by_layer and as_paper:
        raise ValueError("Alg. 2 measures all layers in one pass: choose layer_by_layer or as_paper")
    if layer_by_layer and isinstance(batches, Iterator):
        raise ValueError("layer by layer the batches are gone through many times: give a list or a DataLoader")
    if images is not None and images < 1:
        raise ValueError(f"images is how many to measure, not {images}")
    network = unwrap_model(model)
    layers, left = _choose(network)
    if not layers:
        return Recalibration(images=0, batches=0, passes=0, layers={}, left=left)
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    source = BatchStream(batches, images, forward)
    try:
        with passes.restored(network), torch.no_grad():
            if layer_by_layer:
                done = _layer_by_layer(network, layers, source, group)
            else:
                done = _in_one_pass(network, layers, source, group, as_paper=as_paper)
    except BaseException:
        with torch.no_grad():
            for buffer, values in zip(buffers, before, strict=True):
                buffer.copy_(values)
        raise
    finally:
        source.rewind()
    return replace(done, left=left | {name: "no forward reaches it" for name in layers if name not in done.layers})


def _choose(network: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """The layers to measure, and those to leave with the reason."""
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm | Whitening)}
    some_train = any(layer.training for layer in found.values())
    for name, layer in found.items():
        if layer.running_mean is None or not layer.track_running_stats:
            left[name] = "it keeps no running statistics"
        elif isinstance(layer, StatisticsMode) and layer.frozen:
            left[name] = "it is frozen"
        elif isinstance(layer, StatisticsMode) and layer.statistics == "batch":
            left[name] = "its inference is by the batch"
        elif not isinstance(layer, StatisticsMode) and some_train and not layer.training:
            left[name] = "it is frozen: in evaluation, where other layers are in training"
        else:
            layers[name] = layer
    return layers, left


def _in_one_pass(
    network: nn.Module, layers: Layers, source: BatchStream, group: dist.ProcessGroup | None, *, as_paper: bool
) -> Recalibration:
    share = _together(partial(passes.measure, network, layers, source), group, merged=not as_paper)
    if as_paper:
        for name, found in share.found.items():
            if len(sizes := sorted({batch.count for batch in found})) > 1:
                raise ValueError(
                    f"Alg. 2 is for batches of one size, not of {sizes} values a channel as {name} gets: drop the last "
                    "one (drop_last=True)"
                )
    combine = _as_paper if as_paper else moments.merge
    statistics = {name: _checked(name, layers[name], combine(found)) for name, found in share.found.items()}
    measured = {name: _store(layers[name], found, share, share.uses[name]) for name, found in statistics.items()}
    return Recalibration(images=sum(share.sizes), batches=len(share.sizes), passes=1, layers=measured, left={})


def _layer_by_layer(
    network: nn.Module, layers: Layers, source: BatchStream, group: dist.ProcessGroup | None
) -> Recalibration:
    """One layer a pass, in the order of their calls: those before it normalise by what was stored by then."""
    share = _together(partial(passes.calls, network, layers, source), group, merged=False)
    sizes, uses = share.sizes, share.uses
    pending, measured = dict(layers), dict[str, Measured]()
    for name in uses:
        work = partial(passes.measure, network, pending, source, name, uses[name])
        share = _together(work, group, merged=True)
        if share.sizes != sizes:
            raise ValueError(f"the batches were of {sizes} images, and then of {share.sizes}: give the same each time")
        if name not in share.found:  # forwards that differ from one time to the next
            continue
        layer = pending.pop(name)
        found = _checked(name, layer, moments.merge(share.found[name]))
        measured[name] = _store(layer, found, share, uses[name])
    return Recalibration(images=sum(sizes), batches=len(sizes), passes=1 + len(uses), layers=measured, left={})


def _together(work: Callable[[], Measurements], group: dist.ProcessGroup | None, *, merged: bool) -> Measurements:
    """What all processes found. Where the work fails in one it fails in all, so that none waits for ever."""
    failure, share = None, Measurements()
    try:
        share = work()
        # In main memory, for the processes' devices are not the same; merged, for there is less to send.
        combine = (lambda found: [moments.merge(found)]) if merged else list
        share.found = {name: [m.cpu() for m in combine(found)] for name, found in share.found.items()}
    except BaseException as error:
        failure = error
    everyone = [(failure is not None, share)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        everyone *= dist.get_world_size(group)
        dist.all_gather_object(everyone, everyone[0], group=group)
    if failure is not None:
        raise failure
    if any(failed for failed, _ in everyone):
        raise RuntimeError("recalibration failed in another process, whose message says why")
    whole = Measurements()
    for _, share in everyone:
        whole.sizes += share.sizes
        for name, found in share.found.items():
            whole.found.setdefault(name, []).extend(found)
        for name, uses in share.uses.items():
            whole.uses[name] = max(whole.uses.get(name, 0), uses)
    if not whole.sizes:
        raise ValueError("there is no batch to measure: give at least one")
    return whole


def _as_paper(batches: list[Moments]) -> Moments:
    """Alg. 2, step 10: the mean of the batches' means, and the mean of their unbiased variances."""
    values = sum(batch.count for batch in batches)
    mean = torch.stack([batch.mean for batch in batches]).mean(0)
    variance = torch.stack([batch.variance(unbiased=True) for batch in batches]).mean(0)
    return Moments(values, mean, variance * (values - 1))


def _checked(name: str, layer: Layer, found: Moments) -> Moments:
    """The same, where the layer can hold it.

    Raises:
        TooFewValuesError: it has one value for each channel.
        NotFiniteError: it is not finite.
    """
    if found.count < 2:
        raise TooFewValuesError(f"{name} got a single value for each channel: measure more images; nothing was changed")
    variance = found.variance(unbiased=True)
    if not (found.mean.isfinite().all() and variance.isfinite().all()):
        raise NotFiniteError(name)
    assert layer.running_mean is not None  # or `_choose` would have left it
    held = layer.running_mean.dtype
    if max(found.mean.abs().max(), variance.abs().max()) > torch.finfo(held).max:
        raise ValueError(f"the statistics of {name} do not fit into {held}: recalibrate in float32")
    return found


def _store(layer: Layer, found: Moments, share: Measurements, uses: int) -> Measured:
    """Put the statistics into the layer; what was measured, beside what was there."""
    mean, variance = _stored(layer)
    if isinstance(layer, Whitening):
        layer.store(found, len(share.sizes))
    else:
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(found.mean)
        layer.running_var.copy_(found.variance(unbiased=True))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(len(share.sizes))
    new_mean, new_variance = _stored(layer)
    mean_off = (mean - new_mean).abs() / new_variance.sqrt()  # C
    ratio = variance / new_variance
    variance_off = torch.maximum(ratio, 1 / ratio)  # C
    near = (mean_off <= MEAN_OFF) & (variance_off <= VARIANCE_OFF)  # False for NaN
    return Measured(
        values=found.count,
        uses=uses,
        mean_off=float(mean_off.max()),
        variance_off=float(variance_off.max()),
        off_share=1 - float(near.double().mean()),
    )


def _stored(layer: Layer) -> tuple[Tensor, Tensor]:
    """Copies of the layer's mean and variance + eps, C each, float64."""
    mean = layer.running_mean
    if isinstance(layer, Whitening):
        covariance = layer.running_covariance  # groups x D x D
        variance = None if covariance is None else covariance.diagonal(dim1=1, dim2=2).flatten()
    else:
        variance = layer.running_var
    assert mean is not None and variance is not None
    return mean.to("cpu", torch.float64, copy=True), variance.cpu().double() + layer.eps
