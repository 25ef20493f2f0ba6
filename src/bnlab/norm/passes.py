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
from bnlab.norm.modes import Modes
from bnlab.norm.moments import Moments
from bnlab.norm.whitening import Whitening

Layer = _BatchNorm | Whitening
Layers = Mapping[str, Layer]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The batches, and how a network is called with one."""

    batches: Iterable[Any]
    images: int | None = None
    """stop after the batch that reaches so many"""
    forward: Callable[[nn.Module, Any], object] | None = None

    def each(self, network: nn.Module) -> Iterator[tuple[int, Callable[[], object]]]:
        """For each batch, how many images it has, and the call of the network with it."""
        device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
        seen = 0
        for batch in self.batches:
            images = _images(batch)
            seen += len(images)
            if self.forward is None:
                yield len(images), partial(network, images.to(device))
            else:
                yield len(images), partial(self.forward, network, batch)
            if self.images is not None and seen >= self.images:
                return


@dataclass(kw_only=True)
class Share:
    """What one process found in one pass."""

    found: dict[str, list[Moments]] = field(default_factory=dict)
    """by layer, in the order of their first calls"""
    uses: dict[str, int] = field(default_factory=dict)
    """how often a forward calls each layer"""
    sizes: list[int] = field(default_factory=list)
    """images of each batch"""


class Reached(BaseException):
    """All that is to be measured of this batch is measured: the rest of its forward is not needed."""


@contextmanager
def restored(network: nn.Module) -> Iterator[None]:
    """Whatever happens within, flags, modes and torch's generators are afterwards as they were."""
    names = {"training", "track_running_stats", "_statistics", "_mode"}
    before = [(module, {n: v for n, v in vars(module).items() if n in names}) for module in network.modules()]
    devices = {tensor.device for tensor in network.parameters() if tensor.is_cuda}
    try:
        with torch.random.fork_rng(devices=[*devices]):
            yield
    finally:
        for module, flags in before:
            for name in names & set(vars(module)) - set(flags):
                delattr(module, name)
            vars(module).update(flags)


def in_one_pass(network: nn.Module, layers: Layers, source: Source) -> Share:
    """Measure what each layer gets while all of them normalise by their batches."""
    share = Share()
    with ExitStack() as hooks:
        for name, layer in layers.items():
            normalise_by_batch(layer)
            hooks.enter_context(_before(layer, partial(_add, share, name, layer)))
        for images, call in source.each(network):
            call()
            share.sizes.append(images)
    share.uses = {name: len(found) // len(share.sizes) for name, found in share.found.items()}
    return share


def in_one_level(network: nn.Module, pending: Layers, source: Source, alone: str | None = None) -> Share:
    """Measure the pending layers that no other pending layer stands before; the others normalise by what is stored.

    Which those are shows in the first batch: pending layers give NaN, which reaches whatever stands behind them. A
    layer that is used more than once stands behind itself: it is measured `alone`, normalising by its batch meanwhile.
    """
    share, behind, calls = Share(), set[str](), dict[str, int]()

    def look(name: str, x: Tensor) -> None:
        first = not share.sizes
        calls[name] = calls.get(name, 0) + 1
        if name == alone:
            if not x.isnan().any():
                _add(share, name, pending[name], x)
        elif first and x.isnan().any():
            behind.add(name)
        elif alone is None and name not in behind:
            _add(share, name, pending[name], x)

    def taint(name: str, y: Tensor) -> Tensor | None:
        done = share.sizes and all(calls.get(other) == share.uses[other] for other in share.found)
        if done and share.found:
            raise Reached
        return None if name == alone else torch.full_like(y, torch.nan)

    with ExitStack() as hooks:
        for name, layer in pending.items():
            hooks.enter_context(_before(layer, partial(look, name)))
            hooks.enter_context(_after(layer, partial(taint, name)))
        for images, call in source.each(network):
            calls.clear()
            with suppress(Reached):
                call()
            if not share.sizes:
                share.uses = dict(calls)
                for name in behind & set(share.found):
                    del share.found[name]
            share.sizes.append(images)
    return share


def normalise_by_batch(layer: Layer) -> None:
    """From now on, moving nothing; `restored` undoes it."""
    if isinstance(layer, Modes):
        layer._statistics = "batch"
    else:
        layer.training, layer.track_running_stats = True, False


def normalise_by_stored(layer: Layer) -> None:
    """From now on; `restored` undoes it."""
    if isinstance(layer, Modes):
        layer._statistics = "running"
    else:
        layer.training, layer.track_running_stats = False, True


def _add(share: Share, name: str, layer: Layer, x: Tensor) -> None:
    found = layer.measure(x) if isinstance(layer, Whitening) else moments.measure(x)
    share.found.setdefault(name, []).append(found)


@contextmanager
def _before(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(args[0] if args else kwargs["input"])

    with layer.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def _after(layer: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    with layer.register_forward_hook(lambda module, args, y: see(y)):
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
