"""Subclasses of batch normalisation layers with a forward that does more, such as an activation after normalising.

Their forward runs as it is, but for its one call of `F.batch_norm` or `torch.batch_norm`, or of the base class's
forward, which bnlab's layer computes instead. `why_not` runs it on an example to see that there is such a call.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from bnlab.norm.freeze import Freezable
from bnlab.norm.layers import BatchNorm, is_plain
from bnlab.norm.model_utils import copy_module, example_inputs, layer_name, runs_again

BATCH_NORM: dict[Any, tuple[str, ...]] = {  # the functions, with the names of their parameters
    F.batch_norm: ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
}


class OwnForward(BatchNorm):
    """Comes before the class that has a forward, which comes before bnlab's class, in the order of the bases."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.frozen:
            self.training = False  # it may have been set by hand
        batches, before = self.num_batches_tracked, None
        if batches is not None and self.training:
            before = batches.clone()
        updates: list[bool | Tensor] = []
        try:
            with _ReplacedCalls(self, updates):
                y = super().forward(*args, **kwargs)
        except BaseException:  # a batch is refused, or a checkpoint ends a forward that it runs again
            self._set_count(before)
            raise
        if runs_again():
            self._set_count(before)
        elif before is not None and updates:  # without, the base class's forward has normalised, and counted
            self._correct_count(before, updates[0])
        return y

    def _correct_count(self, before: Tensor, updated: bool | Tensor) -> None:
        """Correct what the forward has counted, which does not know which batches count (see `_count_batch`)."""
        batches = self.num_batches_tracked
        if batches is not None and self.statistics == "population":
            batches.zero_()
        elif batches is not None and isinstance(updated, Tensor):
            self._set_count(torch.where(updated, batches, before))

    def _set_count(self, count: Tensor | None) -> None:
        if self.num_batches_tracked is not None and count is not None:
            self.num_batches_tracked.copy_(count)


def make_traceable(copied: nn.Module) -> None:
    """Give a copy of a layer that normalises by stored statistics, and nothing else, a forward that fx can trace.

    Of a converted layer this is the forward that it had before; F.batch_norm stands for bnlab's normalisation.
    """
    if isinstance(copied, OwnForward):
        _, copied.__class__, _ = vars(type(copied))["made_by"]  # see convert.derived_class
    if isinstance(copied, BatchNorm):

        def by_stored(x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
            return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

        vars(copied).update(_check_shape=lambda _: None, _by_stored=by_stored)


class _ReplacedCalls(TorchFunctionMode):
    """Within this context, calls of batch_norm that a layer's forward makes are computed by the layer."""

    def __init__(self, layer: OwnForward, updates: list[bool | Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.updates = updates  # for each call in training, whether the running statistics were updated

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in BATCH_NORM:
            return func(*args, **kwargs)
        given = dict(zip(BATCH_NORM[func], args, strict=False)) | kwargs
        layer, mean, var = self.layer, given.get("running_mean"), given.get("running_var")
        if not (mean is None or mean is layer.running_mean):  # those of another layer, within this one
            return func(*args, **kwargs)
        x, eps, affine = given["input"], given.get("eps", 1e-5), (given.get("weight"), given.get("bias"))
        layer._check_channels(x)
        if given.get("training", False) or layer.statistics == "batch" or mean is None or var is None:
            y, updated = layer._by_batch(x, mean, var, *affine, given.get("momentum", 0.1), eps=eps)
            if layer.training:
                self.updates.append(updated)
            return y
        if not layer.training:
            layer._uses_stored_statistics()  # refuses those that are outdated
        if eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {eps} at {layer_name(layer)}")
        return layer._by_stored(x, mean, var, *affine, eps)


class Probe(BatchNorm):
    """Takes the place of bnlab's class in a copy of the layer, and records what happens."""

    calls: int = 0
    inside: bool = False

    def _by_batch(self, *args: Any, **kwargs: Any) -> tuple[Tensor, bool | Tensor]:
        self.calls, self.inside = self.calls + 1, True
        try:
            return super()._by_batch(*args, **kwargs)
        finally:
            self.inside = False


class _Watch(TorchFunctionMode):
    """Finds out whether a probe's statistics are used in any other way than to normalise by."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe, self.found = probe, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.probe.inside and getattr(func, "__name__", "") != "__get__":  # such as `shape` or `dtype`
            statistics = self.probe.running_mean, self.probe.running_var
            leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.found |= any(leaf is statistic for leaf in leaves for statistic in statistics)
        return func(*args, **kwargs)


@torch.no_grad()
def why_not(layer: nn.Module, probe: type[nn.Module]) -> str | None:
    """Return the reason why the layer's forward cannot be run with bnlab's normalisation in it, or None.

    Args:
        layer: has a forward that is not torch.nn's or bnlab's.
        probe: its class, with OwnForward before it and Probe behind it.
    """
    kind, failure = type(layer).__name__, "it takes no batch"
    for x in example_inputs(layer):
        try:
            copied = copy_module(layer)
            if isinstance(copied, Freezable):
                copied.unfreeze()
            copied.__class__ = probe
            copied.train()
            with torch.random.fork_rng(devices=[]), _Watch(copied) as watch:
                copied.forward(x)  # without hooks
        except Exception as error:  # of any type: it is not our code, and another number of dimensions may do
            failure = failure if failure != "it takes no batch" else str(error).splitlines()[0]
            continue
        if copied.calls != 1:
            return f"the forward of {kind} normalises by its batch {copied.calls} times, not once"
        return f"the forward of {kind} also uses the statistics in another way" if watch.found else None
    return f"the forward of {kind} cannot be tried out: {failure}"


class _Inputs(TorchFunctionMode):
    """Notes what is normalised by a layer's own statistics."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.layer, self.found = layer, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in BATCH_NORM:
            given = dict(zip(BATCH_NORM[func], args, strict=False)) | kwargs
            if given.get("running_mean") is self.layer.running_mean:
                self.found.append(given["input"].clone())
        return func(*args, **kwargs)


@torch.no_grad()
def normalised_inputs(layer: _BatchNorm, *args: Any, **kwargs: Any) -> list[Tensor]:
    """Return what the layer normalises when its forward gets these arguments, for each time that it does."""
    copied = copy_module(layer).eval()
    if isinstance(copied, BatchNorm):
        copied._statistics = "running"  # population statistics may be outdated
    make_traceable(copied)
    devices = {tensor.device for tensor in copied.buffers() if tensor.is_cuda}
    inputs = _Inputs(copied)
    with torch.random.fork_rng(devices=[*devices]), inputs:
        copied.forward(*tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, args), **kwargs)  # without hooks
    return inputs.found


def normalises(layer: _BatchNorm) -> Literal["its input", "something else", "several times"]:
    """Return what the layer's forward normalises, as an example shows it."""
    for x in () if is_plain(layer) else example_inputs(layer):
        try:
            found = normalised_inputs(layer, x)
        except Exception:  # of any type: it is not our code, and another number of dimensions may do
            continue
        if len(found) > 1:
            return "several times"
        if all(y.shape[:2] == x.shape[:2] and torch.equal(y.to(x).flatten(1), x.flatten(1)) for y in found):
            return "its input"
        return "something else"
    return "its input" if is_plain(layer) else "something else"
