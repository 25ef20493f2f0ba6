"""Recalibration: measure the population statistics anew with the weights fixed (paper, Alg. 2; "PreciseBN").

The running statistics are a moving average over the last few batches, computed with weights that changed meanwhile.
Recalibration counts every image equally, merges the variances of batches together with the distances of their means,
and keeps nothing that earlier weights produced.

There are three ways to measure:
- In one pass (the default): each layer normalises by its batch, as in training, and its input is measured.
- Layer by layer: a layer is measured once all layers before it normalise by their population statistics, as they do
  in inference. This is exact and takes as many passes as there are layers; each pass ends when its layer is reached.
  (A layer that is used more than once comes before itself; it, and what lies between its uses, uses batch statistics.)
- As the paper does (`as_paper`), in one pass: the means and unbiased variances of the batches are averaged.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import moments
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.norm.layers import BatchNorm, StatisticsMode, TooFewValuesError
from bnlab.norm.model_utils import unwrap_model
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

Layer = _BatchNorm | Whitening
Layers = Mapping[str, Layer]
MEAN_OFF, VARIANCE_OFF = 0.1, 1.25  # standard deviations, and a factor: a channel beyond either counts as off


class NotFiniteError(ValueError):
    """`recalibrate` met values that are not finite, at the layer of this name."""

    def __init__(self, layer: str) -> None:
        super().__init__(layer)
        self.layer = layer

    def __str__(self) -> str:
        return f"values that are not finite reach {self.layer}: nothing was changed"


@dataclass(frozen=True, kw_only=True)
class MeasuredLayer:
    """What was measured of one layer, and how far its old statistics were from that."""

    values: int
    """number of values of each channel, over all images and positions"""
    uses: int
    """how often one forward calls the layer; all uses have one set of statistics in common"""
    mean_off: float
    """the largest distance of a channel's old mean from the new one, in new standard deviations"""
    variance_off: float
    """the largest ratio of a channel's old variance to the new one, or its inverse where that is larger; at least 1"""
    off_share: float
    """fraction of channels that were off by more than 0.1 standard deviations or a variance factor of 1.25"""


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """What `recalibrate` did; images and batches are those of all processes."""

    images: int
    batches: int
    passes: int
    """how often all batches were run through the model"""
    layers: dict[str, MeasuredLayer]
    """by the layer's name, in the order in which a forward first calls them"""
    skipped: dict[str, str]
    """the layers whose statistics were not changed, each with the reason"""


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

    They replace the layers' running statistics, and `num_batches_tracked` becomes the number of batches. Nothing is
    changed before all is measured, so that an error or an interruption leaves the model unchanged. Training flags,
    momenta, hooks and torch's generators are restored in any case. Dropout is off meanwhile. Frozen layers are
    skipped: bnlab's after `freeze()`, torch.nn's where they are in evaluation while other layers are in training.

    Across processes (torch.distributed), each process measures batches of its own, as many as it has, and all get the
    same statistics: those of all batches together. Every process of the group has to call this function.

    Args:
        model: on any device, possibly within a DistributedDataParallel.
        batches: image tensors (N x ...), or tuples that begin with one, as from a DataLoader. The images should be
            like those that inference will get, so without augmentation, and shuffled, because in one pass each layer
            normalises by its batch. They are moved to the model's device.
        images: stop after the batch that reaches this number of images (default: all). 1,000 to 10,000 suffice
            (Wu & Johnson 2021).
        layer_by_layer: measure exactly. The batches are run many times, so they must not be a generator, and an
            exception ends each forward early.
        as_paper: follow Alg. 2 to the letter, for batches of one size.
        forward: how to call the model with a batch (default: `model(images)`).
        group: the processes that measure together (default: all).

    Raises:
        NotFiniteError: values that are not finite reach a layer.
        TooFewValuesError: a layer gets a single value for each channel.
        ValueError: there is no batch; batches or options do not fit together; statistics do not fit into a buffer.
    """
    if layer_by_layer and as_paper:
        raise ValueError("Alg. 2 measures all layers in one pass: choose layer_by_layer or as_paper")
    if layer_by_layer and isinstance(batches, Iterator):
        raise ValueError("layer_by_layer runs the batches many times: pass a list or a DataLoader, not an iterator")
    if images is not None and images < 1:
        raise ValueError(f"images is the number of images to measure, at least 1, not {images}")
    network = unwrap_model(model)
    layers, skipped = _choose_layers(network)
    if not layers:
        return Recalibration(images=0, batches=0, passes=0, layers={}, skipped=skipped)
    buffers = [buffer for layer in layers.values() for buffer in layer.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    stream = BatchStream(batches, images, forward)
    try:
        with evaluation_mode(network), torch.no_grad():
            if layer_by_layer:
                done = _measure_layer_by_layer(network, layers, stream, group)
            else:
                done = _measure_in_one_pass(network, layers, stream, group, as_paper=as_paper)
    except BaseException:
        with torch.no_grad():
            for buffer, values in zip(buffers, before, strict=True):
                buffer.copy_(values)
        raise
    finally:
        stream.rewind()
    unreached = {name: "no forward reaches it" for name in layers if name not in done.layers}
    return replace(done, skipped=skipped | unreached)


def _choose_layers(network: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers to measure, and those to skip with the reason."""
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm | Whitening)}
    some_train = any(layer.training for layer in found.values())
    for name, layer in found.items():
        if layer.running_mean is None or not layer.track_running_stats:
            skipped[name] = "it keeps no running statistics"
        elif isinstance(layer, StatisticsMode) and layer.frozen:
            skipped[name] = "it is frozen"
        elif isinstance(layer, StatisticsMode) and layer.statistics == "batch":
            skipped[name] = "its inference is by the batch"
        elif not isinstance(layer, StatisticsMode) and some_train and not layer.training:
            skipped[name] = "it is frozen: in evaluation, where other layers are in training"
        else:
            layers[name] = layer
    return layers, skipped


class BatchStream:
    """The batches, and how to call a network with one. Each pass gets the same, even from a loader that shuffles."""

    def __init__(
        self, batches: Iterable[Any], images: int | None, forward: Callable[[nn.Module, Any], object] | None
    ) -> None:
        self.batches, self.images, self.forward = batches, images, forward
        own = getattr(batches, "generator", None)
        self.generator = own if isinstance(own, torch.Generator) else torch.default_generator
        self.state = self.generator.get_state()

    def rewind(self) -> None:
        """Restore the generator by which a loader shuffles."""
        self.generator.set_state(self.state)

    def calls(self, network: nn.Module) -> Iterator[tuple[int, Callable[[], object]]]:
        """Yield, for each batch until `images` are reached, its number of images and the call of the network."""
        self.rewind()
        tensors = [*network.parameters(), *network.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        total = 0
        for batch in self.batches:
            images = _images_of(batch)
            total += len(images)
            if self.forward is None:
                if images.dtype == torch.uint8:
                    raise ValueError(
                        "a batch holds uint8 images: pass them as the model takes them, or convert them in forward="
                    )
                yield len(images), partial(network, images.to(device))
            else:
                yield len(images), partial(self.forward, network, batch)
            if self.images is not None and total >= self.images:
                return


def _images_of(batch: Any) -> Tensor:
    """Return the first tensor of a batch, which holds its images."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif isinstance(batch, list | tuple) and batch:
            batch = batch[0]
        else:
            raise ValueError(
                f"a batch has {type(batch).__name__} where its images should be: pass tensors, or tuples that begin "
                "with one"
            )
    return batch


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Set the network to evaluation, and restore training flags and torch's generators at the end.

    The flags are set one by one, because `eval()` may do more, such as merging weights, that `train()` does not undo.
    """
    before = [(module, module.training) for module in network.modules()]
    devices = {tensor.device for tensor in [*network.parameters(), *network.buffers()] if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices=[*devices]):
            for module, _ in before:
                module.training = False
            yield
    finally:
        for module, training in before:
            module.training = training


# The three ways.


def _measure_in_one_pass(
    network: nn.Module, layers: Layers, stream: BatchStream, group: dist.ProcessGroup | None, *, as_paper: bool
) -> Recalibration:
    work = partial(_measure_inputs, network, layers, stream)
    measured = _of_all_processes(work, group, merged=not as_paper)
    if as_paper:
        for name, found in measured.moments.items():
            if len(sizes := sorted({batch.count for batch in found})) > 1:
                raise ValueError(
                    f"Alg. 2 is for batches of one size, not of {sizes} values a channel as {name} gets: drop the last "
                    "one (drop_last=True)"
                )
    combine = _average_as_paper if as_paper else moments.merge
    statistics = {name: _checked(name, layers[name], combine(found)) for name, found in measured.moments.items()}
    batches = len(measured.batch_sizes)
    done = {name: _store(layers[name], new, batches, measured.uses[name]) for name, new in statistics.items()}
    return Recalibration(images=sum(measured.batch_sizes), batches=batches, passes=1, layers=done, skipped={})


def _measure_layer_by_layer(
    network: nn.Module, layers: Layers, stream: BatchStream, group: dist.ProcessGroup | None
) -> Recalibration:
    """Measure one layer in each pass, in the order of their calls: those before it use what is stored by then."""
    counted = _of_all_processes(partial(_count_calls, network, layers, stream), group, merged=False)
    sizes, uses = counted.batch_sizes, counted.uses
    pending, done = dict(layers), dict[str, MeasuredLayer]()
    for name in uses:
        work = partial(_measure_inputs, network, pending, stream, name, uses[name])
        measured = _of_all_processes(work, group, merged=True)
        if measured.batch_sizes != sizes:
            raise ValueError(
                f"the batches had {sizes} images, and then {measured.batch_sizes}: pass the same ones for each pass"
            )
        if name not in measured.moments:  # forwards that differ from one pass to the next
            continue
        layer = pending.pop(name)
        new = _checked(name, layer, moments.merge(measured.moments[name]))
        done[name] = _store(layer, new, len(sizes), uses[name])
    return Recalibration(images=sum(sizes), batches=len(sizes), passes=1 + len(uses), layers=done, skipped={})


def _average_as_paper(batches: list[Moments]) -> Moments:
    """Average the batches' means, and their unbiased variances (Alg. 2, step 10)."""
    values = sum(batch.count for batch in batches)
    mean = torch.stack([batch.mean for batch in batches]).mean(0)
    variance = torch.stack([batch.variance(unbiased=True) for batch in batches]).mean(0)
    return Moments(values, mean, variance * (values - 1))


# One pass of the batches.


@dataclass(kw_only=True)
class Measurements:
    """What one process finds in one pass."""

    moments: dict[str, list[Moments]] = field(default_factory=dict)  # by layer, in the order of their first calls
    uses: dict[str, int] = field(default_factory=dict)  # the most calls of each layer in one forward
    batch_sizes: list[int] = field(default_factory=list)  # the number of images of each batch
    calls: dict[str, int] = field(default_factory=dict)  # the calls of each layer in the present forward

    def count_call(self, name: str, _: Tensor) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1
        self.uses[name] = max(self.uses.get(name, 0), self.calls[name])

    def run(self, network: nn.Module, stream: BatchStream) -> None:
        for images, call in stream.calls(network):
            self.calls.clear()
            with suppress(StopForward):
                call()
            self.batch_sizes.append(images)


class StopForward(BaseException):
    """Ends a forward: all that is to be measured of this batch is measured."""


def _count_calls(network: nn.Module, layers: Layers, stream: BatchStream) -> Measurements:
    """Find which layers are called, in which order and how often, without measuring them."""
    found = Measurements()
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_normalising_by("stored", layer))
            stack.enter_context(_hooked_before(layer, partial(found.count_call, name)))
        found.run(network, stream)
    return found


def _measure_inputs(
    network: nn.Module, layers: Layers, stream: BatchStream, only: str | None = None, uses: int = 0
) -> Measurements:
    """Measure the input of each layer while all of them normalise by their batches.

    With `only`, just that layer is measured, which a forward calls at most `uses` times; then the forward is ended.
    """
    found = Measurements()

    def measure(name: str, x: Tensor) -> None:
        layer = layers[name]
        found.count_call(name, x)
        batch = layer.measure(x) if isinstance(layer, Whitening) else moments.measure(x)
        found.moments.setdefault(name, []).append(batch)
        if name == only and found.calls[name] == uses:
            raise StopForward
        if batch.count == 1:
            raise TooFewValuesError(
                f"a batch has one value for each channel at {name}, which has no variance: leave it out "
                "(drop_last=True), pass larger batches, or measure layer_by_layer"
            )
        if name in plain:
            mean, var = (t.to(x.device, plain[name]) for t in (batch.mean, batch.variance(unbiased=False)))
            layer._buffers.update(running_mean=mean, running_var=var)

    # Most layers normalise a batch by just what is measured of it, so they need not compute that again.
    plain = {name: dtype for name, layer in layers.items() if (dtype := _plain_dtype(layer)) and only is None}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_normalising_by("measured" if name in plain else "batch", layer))
            if only in (None, name):
                stack.enter_context(_hooked_before(layer, partial(measure, name)))
        found.run(network, stream)
    return found


def _plain_dtype(layer: Layer) -> torch.dtype | None:
    """The statistics' dtype of a layer that normalises a batch by one mean and one variance; None for other layers."""
    if isinstance(layer, BatchNorm) and (isinstance(layer, GhostBatchNorm) or layer.example_weight):
        return None
    dtype = layer.running_mean.dtype if isinstance(layer, _BatchNorm) and layer.running_mean is not None else None
    return dtype if dtype in (torch.float32, torch.float64) else None


@contextmanager
def _normalising_by(which: Literal["stored", "batch", "measured"], layer: Layer) -> Iterator[None]:
    """Normalise by the stored statistics, whatever they are, or by the batch of this process alone, updating nothing.

    "measured" is "batch" for a layer whose stored statistics are replaced by those of each batch before it runs.
    """
    buffers = dict(layer._buffers)
    try:
        if isinstance(layer, StatisticsMode):
            statistics, layer._statistics = layer._statistics, "batch" if which == "batch" else "running"
        elif which != "stored":  # torch.nn's layers, also SyncBatchNorm, use the batch in evaluation without statistics
            layer._buffers.update(running_mean=None, running_var=None)
        yield
    finally:
        layer._buffers.update(buffers)
        if isinstance(layer, StatisticsMode):
            layer._statistics = statistics


@contextmanager
def _hooked_before(layer: nn.Module, call: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call(args[0] if args else kwargs["input"])

    with layer.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def _of_all_processes(
    work: Callable[[], Measurements], group: dist.ProcessGroup | None, *, merged: bool
) -> Measurements:
    """Do the work and combine what all processes found. If it fails in one it fails in all, so that none waits."""
    failure, own = None, Measurements()
    try:
        own = work()
        # On the CPU, for the processes' devices differ; merged, for there is less to send.
        combine = (lambda batches: [moments.merge(batches)]) if merged else list
        own.moments = {name: [m.cpu() for m in combine(batches)] for name, batches in own.moments.items()}
    except BaseException as error:
        failure = error
    results = [(failure is not None, own)]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
        results *= dist.get_world_size(group)
        dist.all_gather_object(results, results[0], group=group)
    if failure is not None:
        raise failure
    if any(failed for failed, _ in results):
        raise RuntimeError("recalibration failed in another process, whose message says why")
    together = Measurements()
    for _, part in results:
        together.batch_sizes += part.batch_sizes
        for name, batches in part.moments.items():
            together.moments.setdefault(name, []).extend(batches)
        for name, uses in part.uses.items():
            together.uses[name] = max(together.uses.get(name, 0), uses)
    if not together.batch_sizes:
        raise ValueError("there is no batch to measure: pass at least one")
    return together


# A layer's statistics.


def _checked(name: str, layer: Layer, new: Moments) -> Moments:
    """Return the new statistics, if the layer can hold them; raise what `recalibrate` raises if not."""
    if new.count < 2:
        raise TooFewValuesError(f"{name} got a single value for each channel: measure more images; nothing was changed")
    variance = new.variance(unbiased=True)
    if not (new.mean.isfinite().all() and variance.isfinite().all()):
        raise NotFiniteError(name)
    assert layer.running_mean is not None  # or `_choose_layers` would have skipped it
    dtype = layer.running_mean.dtype
    if max(new.mean.abs().max(), variance.abs().max()) > torch.finfo(dtype).max:
        raise ValueError(f"the statistics of {name} do not fit into {dtype}: recalibrate in float32")
    return new


def _store(layer: Layer, new: Moments, batches: int, uses: int) -> MeasuredLayer:
    """Store the statistics in the layer, and compare them with the old ones."""
    old_mean, old_variance = _read_statistics(layer)
    if isinstance(layer, Whitening):
        layer.store(new, batches)
    else:
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(new.mean)
        layer.running_var.copy_(new.variance(unbiased=True))
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.fill_(batches)
    mean, variance = _read_statistics(layer)
    mean_off = (old_mean - mean).abs() / variance.sqrt()  # C
    ratio = old_variance / variance
    variance_off = torch.maximum(ratio, 1 / ratio)  # C
    near = (mean_off <= MEAN_OFF) & (variance_off <= VARIANCE_OFF)  # False for NaN
    return MeasuredLayer(
        values=new.count,
        uses=uses,
        mean_off=float(mean_off.max()),
        variance_off=float(variance_off.max()),
        off_share=float((~near).double().mean()),
    )


def _read_statistics(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return copies of the layer's mean and variance + eps, C each, float64, on the CPU."""
    mean = layer.running_mean
    if isinstance(layer, Whitening):
        covariance = layer.running_covariance  # groups x D x D
        variance = None if covariance is None else covariance.diagonal(dim1=1, dim2=2).flatten()
    else:
        variance = layer.running_var
    assert mean is not None and variance is not None
    return mean.to("cpu", torch.float64, copy=True), variance.cpu().double() + layer.eps
