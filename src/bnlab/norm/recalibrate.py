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

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import moments, own_forward
from bnlab.norm.freeze import Freezable
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.norm.layers import BatchNorm, StatisticsMode, TooFewValuesError
from bnlab.norm.model_utils import unwrap_model
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

Layer = _BatchNorm | Whitening
Layers = Mapping[str, Layer]
Measured = tuple[str, int, list[Moments]]  # a layer's name, its uses, and what was measured of it
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
    skipped: those after `freeze()`, torch.nn's where they are in evaluation while other layers are in training.

    Across processes (torch.distributed), each process measures its own batches, as many as it has, and all get the
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
    before = {buffer: buffer.clone() for layer in layers.values() for buffer in layer.buffers(recurse=False)}
    runner = BatchRunner(network, batches, images, forward, group, merge=not as_paper)
    done: dict[str, MeasuredLayer] = {}
    try:
        with evaluation_mode(network), torch.no_grad():
            measure = _measure_layer_by_layer if layer_by_layer else _measure_in_one_pass
            for name, uses, batches_found in measure(layers, runner):
                found = [batch for batch in batches_found if batch.count]
                if not found:
                    skipped[name] = "it gets empty batches alone"
                    continue
                new = _average_as_paper(name, found) if as_paper else moments.merge(found)
                done[name] = _store(name, layers[name], new, len(runner.batch_sizes), uses)
    except BaseException:
        with torch.no_grad():
            for buffer, values in before.items():
                buffer.copy_(values)
        raise
    finally:
        runner.rewind()
    skipped |= {name: "no forward reaches it" for name in layers if name not in done and name not in skipped}
    sizes = runner.batch_sizes
    return Recalibration(images=sum(sizes), batches=len(sizes), passes=runner.passes, layers=done, skipped=skipped)


def _choose_layers(network: nn.Module) -> tuple[dict[str, Layer], dict[str, str]]:
    """Return the layers to measure, and those to skip with the reason."""
    layers: dict[str, Layer] = {}
    skipped: dict[str, str] = {}
    found = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm | Whitening)}
    some_train = any(layer.training for layer in found.values())
    for name, layer in found.items():
        if layer.running_mean is None or not layer.track_running_stats:
            skipped[name] = "it keeps no running statistics"
        elif isinstance(layer, Freezable) and layer.frozen:
            skipped[name] = "it is frozen"
        elif isinstance(layer, StatisticsMode) and layer.statistics == "batch":
            skipped[name] = "its inference is by the batch"
        elif not isinstance(layer, StatisticsMode) and some_train and not layer.training:
            skipped[name] = "it is frozen: in evaluation, where other layers are in training"
        elif isinstance(layer, _BatchNorm) and own_forward.normalises(layer) == "several times":
            skipped[name] = f"the forward of {type(layer).__name__} normalises several times, not once"
        else:
            layers[name] = layer
    return layers, skipped


def _measure_in_one_pass(layers: Layers, runner: "BatchRunner") -> Iterator[Measured]:
    found = runner.run(layers, layers)
    for name, batches in found.moments.items():
        yield name, found.uses[name], batches


def _measure_layer_by_layer(layers: Layers, runner: "BatchRunner") -> Iterator[Measured]:
    """Measure one layer in each pass, in the order of their calls: those before it use what is stored by then."""
    pending = dict(layers)
    for name, uses in runner.run(layers, ()).uses.items():
        found = runner.run(pending, {name}, stop_after=uses)
        if name in found.moments:  # always, unless forwards differ from one pass to the next
            del pending[name]
            yield name, uses, found.moments[name]


def _average_as_paper(name: str, batches: list[Moments]) -> Moments:
    """Average the batches' means, and their unbiased variances (Alg. 2, step 10)."""
    if len(sizes := sorted({batch.count for batch in batches})) > 1:
        raise ValueError(
            f"Alg. 2 is for batches of one size, not of {sizes} values a channel as {name} gets: drop the last one "
            "(drop_last=True)"
        )
    values = sum(batch.count for batch in batches)
    mean = torch.stack([batch.mean for batch in batches]).mean(0)
    variance = torch.stack([batch.variance(unbiased=True) for batch in batches]).mean(0)
    return Moments(values, mean, variance * (values - 1))


# The passes of the batches.


@dataclass(kw_only=True)
class Measurements:
    """What is found in one pass."""

    moments: dict[str, list[Moments]] = field(default_factory=lambda: defaultdict(list))  # in the order of first calls
    uses: Counter[str] = field(default_factory=Counter)  # the most calls of each layer in one forward
    batch_sizes: list[int] = field(default_factory=list)  # the number of images of each batch


class StopForward(BaseException):
    """Ends a forward: all that is to be measured of this batch is measured."""


@dataclass
class BatchRunner:
    """Runs the batches through the network. Each pass gets the same ones, even from a loader that shuffles."""

    network: nn.Module
    batches: Iterable[Any]
    images: int | None
    forward: Callable[[nn.Module, Any], object] | None
    group: dist.ProcessGroup | None
    merge: bool  # whether each process merges what it measures
    passes: int = 0
    batch_sizes: list[int] = field(default_factory=list)  # of all processes

    def __post_init__(self) -> None:
        self.device = next(itertools.chain(self.network.parameters(), self.network.buffers())).device
        own = getattr(self.batches, "generator", None)
        self.generator = own if isinstance(own, torch.Generator) else torch.default_generator
        self.state = self.generator.get_state()

    def rewind(self) -> None:
        """Restore the generator by which a loader shuffles."""
        self.generator.set_state(self.state)

    def run(self, layers: Layers, measured: Collection[str], *, stop_after: int = 0) -> Measurements:
        """Run the batches once, measure inputs of the layers, and return what all processes found.

        If any layer is `measured`, all of them normalise by their batches; if none is, by what they have stored, and
        just their calls are counted. With `stop_after`, that call of the one measured layer ends each forward.
        """
        self.passes += 1
        self.rewind()
        found, calls, failure = Measurements(), Counter[str](), None
        # Most layers normalise a batch by exactly what is measured of it: they get that, and need not compute it again.
        replaced = set() if stop_after else {name for name in measured if _normalises_by_moments(layers[name])}

        own = {name: layer for name in measured if isinstance(layer := layers[name], _BatchNorm)}
        others = {name: layer for name, layer in own.items() if own_forward.normalises(layer) != "its input"}

        def before_forward(name: str, layer: Layer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] += 1
            if name not in measured:
                return
            x = args[0] if args else kwargs["input"]
            if name in others and (inputs := own_forward.normalised_inputs(others[name], *args, **kwargs)):
                x = inputs[0]
            batch = layer.measure(x) if isinstance(layer, Whitening) else moments.measure(x)
            found.moments[name].append(batch)
            if calls[name] == stop_after:
                raise StopForward
            if batch.count == 1:
                raise TooFewValuesError(
                    f"a batch has one value for each channel at {name}, which has no variance: leave it out "
                    "(drop_last=True), pass larger batches, or measure layer_by_layer"
                )
            if name in replaced:
                like, _ = _statistics_of(layer)
                mean, var = batch.mean.to(like), batch.variance(unbiased=False).to(like)
                layer._buffers.update(running_mean=mean, running_var=var)

        try:
            with ExitStack() as stack:
                for name, layer in layers.items():
                    by_batch = bool(measured) and name not in replaced
                    stack.enter_context(_normalising(layer, by_batch=by_batch))
                    hook = partial(before_forward, name)
                    stack.enter_context(layer.register_forward_pre_hook(hook, with_kwargs=True))
                for batch in self.batches:
                    images = _images_of(batch)
                    if not images.numel():
                        continue
                    calls.clear()
                    with suppress(StopForward):
                        self._call(batch, images)
                    found.uses |= calls
                    found.batch_sizes.append(len(images))
                    if self.images is not None and sum(found.batch_sizes) >= self.images:
                        break
            # Merged parts are less to send, and the processes' devices may differ.
            for name, parts in found.moments.items():
                found.moments[name] = [part.cpu() for part in ([moments.merge(parts)] if self.merge else parts)]
        except BaseException as error:
            failure = error
        together = self._of_all_processes(found, failure)
        before, sizes = self.batch_sizes, together.batch_sizes
        if before and sizes != before:
            raise ValueError(f"the batches had {before} images, and then {sizes}: pass the same ones for each pass")
        self.batch_sizes = sizes
        return together

    def _call(self, batch: Any, images: Tensor) -> None:
        if self.forward is not None:
            self.forward(self.network, batch)
        elif images.dtype == torch.uint8:
            raise ValueError("a batch holds uint8 images: pass them as the model takes them, or convert in forward=")
        else:
            self.network(images.to(self.device))

    def _of_all_processes(self, own: Measurements, failure: BaseException | None) -> Measurements:
        """Combine what all processes found. If one has failed, all of them fail, so that none waits for it."""
        parts = [own if failure is None else None]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(self.group) > 1:
            parts *= dist.get_world_size(self.group)
            dist.all_gather_object(parts, parts[0], group=self.group)
        if failure is not None:
            raise failure
        together = Measurements()
        for part in parts:
            if part is None:
                raise RuntimeError("recalibration failed in another process, whose message says why")
            together.batch_sizes += part.batch_sizes
            together.uses |= part.uses
            for name, batches in part.moments.items():
                together.moments[name] += batches
        if not together.batch_sizes:
            raise ValueError("there is no batch to measure: pass at least one")
        return together


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


@contextmanager
def _normalising(layer: Layer, *, by_batch: bool) -> Iterator[None]:
    """Normalise by the batch of this process alone, or by the buffers, whatever they hold; neither updates them."""
    buffers = dict(layer._buffers)
    try:
        if isinstance(layer, StatisticsMode):
            statistics, layer._statistics = layer._statistics, "batch" if by_batch else "running"
        elif by_batch:  # torch.nn's layers, also SyncBatchNorm, use the batch in evaluation without statistics
            layer._buffers.update(running_mean=None, running_var=None)
        yield
    finally:
        layer._buffers.update(buffers)
        if isinstance(layer, StatisticsMode):
            layer._statistics = statistics


def _normalises_by_moments(layer: Layer) -> bool:
    """Whether the layer normalises a batch by one mean and one variance of each channel, which its buffers can hold."""
    mixed = isinstance(layer, BatchNorm) and layer.example_weight > 0
    precise = _statistics_of(layer)[0].dtype in (torch.float32, torch.float64)
    return precise and not mixed and not isinstance(layer, Whitening | GhostBatchNorm)


# A layer's statistics.


def _store(name: str, layer: Layer, new: Moments, batches: int, uses: int) -> MeasuredLayer:
    """Store the statistics if the layer can hold them, and compare them with the old ones."""
    if new.count < 2:
        raise TooFewValuesError(f"{name} got a single value for each channel: measure more images; nothing was changed")
    unbiased = new.variance(unbiased=True)
    if not (new.mean.isfinite().all() and unbiased.isfinite().all()):
        raise NotFiniteError(name)
    stored_mean, stored_variance = _statistics_of(layer)
    if max(new.mean.abs().max(), unbiased.abs().max()) > torch.finfo(stored_mean.dtype).max:
        raise ValueError(f"the statistics of {name} do not fit into {stored_mean.dtype}: recalibrate in float32")
    old_mean, old_variance = _read_channels(stored_mean, stored_variance, layer.eps)
    stored_mean.copy_(new.mean)
    stored_variance.copy_(unbiased)
    if layer.num_batches_tracked is not None:
        layer.num_batches_tracked.fill_(batches)
    mean, variance = _read_channels(stored_mean, stored_variance, layer.eps)
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


def _statistics_of(layer: Layer) -> tuple[Tensor, Tensor]:
    """Return the buffers of the mean, C, and of the variance, C, or covariance, groups x D x D."""
    variance = layer.running_covariance if isinstance(layer, Whitening) else layer.running_var
    assert layer.running_mean is not None and variance is not None  # or `_choose_layers` would have skipped it
    return layer.running_mean, variance


def _read_channels(mean: Tensor, variance: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return copies of the mean and variance + eps, C each, float64, on the CPU; of a covariance its diagonal."""
    if variance.ndim == 3:  # groups x D x D
        variance = variance.diagonal(dim1=1, dim2=2).flatten()
    return mean.to("cpu", torch.float64, copy=True), variance.cpu().double() + eps
