"""Passes of batches through a network while the inputs of its normalising layers are measured.

Nothing here is for users: see `population.py`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import moments
from bnlab.norm.ghost import GhostBatchNorm
from bnlab.norm.layers import BatchNorm
from bnlab.norm.modes import StatisticsMode, TooFewValuesError
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

Layer = _BatchNorm | Whitening
Layers = Mapping[str, Layer]


class BatchStream:
    """The batches, and how a network is called with one. Each pass gets the same, also of a loader that shuffles."""

    def __init__(
        self,
        batches: Iterable[Any],
        images: int | None = None,
        forward: Callable[[nn.Module, Any], object] | None = None,
    ) -> None:
        self.batches, self.images, self.forward = batches, images, forward
        own = getattr(batches, "generator", None)
        self.generator = own if isinstance(own, torch.Generator) else torch.default_generator
        self.state = self.generator.get_state()

    def rewind(self) -> None:
        """Put the generator that a loader shuffles by where it was."""
        self.generator.set_state(self.state)

    def each(self, network: nn.Module) -> Iterator[tuple[int, Callable[[], object]]]:
        """For each batch, how many images it has, and the call of the network with it; `images` ends it."""
        self.rewind()
        tensors = [*network.parameters(), *network.buffers()]
        device = tensors[0].device if tensors else torch.device("cpu")
        seen = 0
        for batch in self.batches:
            images = _images(batch)
            seen += len(images)
            if self.forward is None:
                if images.dtype == torch.uint8:
                    raise ValueError(
                        "a batch holds uint8 images: give them as the model takes them, or say with forward= how to"
                    )
                yield len(images), partial(network, images.to(device))
            else:
                yield len(images), partial(self.forward, network, batch)
            if self.images is not None and seen >= self.images:
                return


@dataclass(kw_only=True)
class Measurements:
    """What one process found in one pass."""

    found: dict[str, list[Moments]] = field(default_factory=dict)
    """by layer, in the order of their first calls"""
    uses: dict[str, int] = field(default_factory=dict)
    """the most calls of each layer in one forward"""
    sizes: list[int] = field(default_factory=list)
    """images of each batch"""

    def called(self, name: str, now: dict[str, int]) -> None:
        """A layer was called; `now` counts the calls of this forward."""
        now[name] = now.get(name, 0) + 1
        self.uses[name] = max(self.uses.get(name, 0), now[name])


class StopForward(BaseException):
    """All that is to be measured of this batch is measured: the rest of its forward is not needed."""


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """In evaluation; whatever happens within, training flags and torch's generators are afterwards as they were.

    The flags are set one by one: `eval()` may do more, such as merging weights, that `train()` does not undo.
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


def calls(network: nn.Module, layers: Layers, source: BatchStream) -> Measurements:
    """Only see which layers are called, in which order and how often."""
    share, now = Measurements(), dict[str, int]()

    def count(name: str, _: Tensor) -> None:
        share.called(name, now)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_normalising_by_stored(layer))
            stack.enter_context(_before(layer, partial(count, name)))
        for images, call in source.each(network):
            now.clear()
            call()
            share.sizes.append(images)
    return share


def measure(
    network: nn.Module, layers: Layers, source: BatchStream, only: str | None = None, uses: int = 0
) -> Measurements:
    """Measure what each layer gets while all of them normalise by their batches.

    With `only` just that one is measured, which is called at most `uses` times: the forward is then ended.
    """
    share, now = Measurements(), dict[str, int]()

    def look(name: str, x: Tensor) -> None:
        layer = layers[name]
        share.called(name, now)
        found = layer.measure(x) if isinstance(layer, Whitening) else moments.measure(x)
        share.found.setdefault(name, []).append(found)
        if name == only and now[name] == uses:
            raise StopForward
        if found.count == 1:
            raise TooFewValuesError(
                f"a batch has one value for each channel at {name}, and cannot be normalised by itself: leave it out "
                "(drop_last=True), give larger batches, or measure layer_by_layer"
            )
        if name in plain:
            mean, var = found.mean, found.variance(unbiased=False)
            layer._buffers.update(
                running_mean=mean.to(x.device, plain[name]), running_var=var.to(x.device, plain[name])
            )

    # What is measured of a batch is also what most layers normalise it by: they need not read it once more.
    plain = {name: dtype for name, layer in layers.items() if (dtype := _precision(layer)) and only is None}
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(_normalising_by_batch(layer, measured=name in plain))
            if only in (None, name):
                stack.enter_context(_before(layer, partial(look, name)))
        for images, call in source.each(network):
            now.clear()
            with suppress(StopForward):
                call()
            share.sizes.append(images)
    return share


def _precision(layer: Layer) -> torch.dtype | None:
    """That of the statistics of a layer that normalises all of a batch by one mean and variance; None for others."""
    if isinstance(layer, BatchNorm) and (isinstance(layer, GhostBatchNorm) or layer.example_weight):
        return None
    dtype = layer.running_mean.dtype if isinstance(layer, _BatchNorm) and layer.running_mean is not None else None
    return dtype if dtype in (torch.float32, torch.float64) else None


@contextmanager
def _normalising_by_batch(layer: Layer, *, measured: bool) -> Iterator[None]:
    """By the batch of this process alone, and moving nothing; if `measured`, its statistics will be put in place."""
    kept = dict(layer._buffers)
    statistics = layer._statistics if isinstance(layer, StatisticsMode) else None
    try:
        if isinstance(layer, StatisticsMode):
            layer._statistics = "running" if measured else "batch"
        else:  # torch's, also the synchronised ones: in evaluation without statistics
            layer._buffers.update(running_mean=None, running_var=None)
        yield
    finally:
        layer._buffers.update(kept)
        if isinstance(layer, StatisticsMode) and statistics is not None:
            layer._statistics = statistics


@contextmanager
def _normalising_by_stored(layer: Layer) -> Iterator[None]:
    """By whatever statistics there are."""
    if not isinstance(layer, StatisticsMode):
        yield  # as in evaluation anyway
        return
    before, layer._statistics = layer._statistics, "running"
    try:
        yield
    finally:
        layer._statistics = before


@contextmanager
def _before(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["input"])

    with layer.register_forward_pre_hook(hook, with_kwargs=True):
        yield


def _images(batch: Any) -> Tensor:
    """The first tensor of a batch, which its images are."""
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping):
            batch = next(iter(batch.values()), None)
        elif isinstance(batch, list | tuple) and batch:
            batch = batch[0]
        else:
            raise ValueError(
                f"a batch has {type(batch).__name__} where its images should be: give tensors, or tuples that begin "
                "with one"
            )
    return batch
