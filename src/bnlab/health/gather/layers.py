"""Finds the layers that keep statistics, and sees in one forward of a few images how they are used.

Values are known by the memory that they are in, because a view of a layer's output is still its output.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnlab.health.evidence import Family, Floats, LayerEvidence
from bnlab.norm.freeze import Freezable, own_class
from bnlab.norm.own_forward import BATCH_NORM
from bnlab.norm.whitening import Whitening

ACTIVATIONS = {"relu", "relu6", "leakyrelu", "elu", "selu", "silu", "gelu", "hardswish", "sigmoid", "tanh"}
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation, these return their input
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def find_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that keep running statistics or could, by their first name."""
    return {name: module for name, module in network.named_modules() if family_of(module) is not None}


def family_of(module: nn.Module) -> Family | None:
    """How a module normalises; None if it keeps no statistics, and could not."""
    if isinstance(module, _BatchNorm):
        return "batch"
    if isinstance(module, Whitening):
        return "whitening"
    if isinstance(module, _InstanceNorm):
        return "instance"
    mean, variance = module._buffers.get("running_mean"), module._buffers.get("running_var")
    return "frozen" if mean is not None and variance is not None and mean.shape == variance.shape else None


def other_norms(network: nn.Module) -> dict[str, int]:
    """How many normalisation layers of each class keep no statistics."""
    return dict(Counter(type(m).__name__ for m in network.modules() if isinstance(m, _OTHER_NORMS)))


def describe(name: str, module: nn.Module) -> LayerEvidence:
    """What the layer itself shows."""
    family = family_of(module)
    assert family is not None
    mean, variance = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if variance is None and isinstance(module, Whitening) and module.running_covariance is not None:
        variance = module.running_covariance.diagonal(dim1=1, dim2=2).flatten()
    gamma, beta = getattr(module, "weight", None), getattr(module, "bias", None)
    updates = getattr(module, "num_batches_tracked", None)
    channels = getattr(module, "num_features", None) or (0 if mean is None else len(mean))
    return LayerEvidence(
        name=name,
        kind=own_class(module).__name__,
        family=family,
        channels=int(channels),
        eps=float(getattr(module, "eps", 1e-5)),
        momentum=getattr(module, "momentum", None if family == "frozen" else 0.1),
        tracks=bool(getattr(module, "track_running_stats", mean is not None)),
        training=module.training,
        frozen=family == "frozen" or (isinstance(module, Freezable) and module.frozen),
        gamma=_array(gamma),
        beta=_array(beta),
        gamma_trained=isinstance(gamma, nn.Parameter) and gamma.requires_grad,
        beta_trained=isinstance(beta, nn.Parameter) and beta.requires_grad,
        running_mean=_array(mean),
        running_variance=_array(variance),
        updates=int(updates) if isinstance(updates, Tensor) and not updates.is_meta else None,
        dtype="none" if mean is None else str(mean.dtype).removeprefix("torch."),
    )


def _array(tensor: Any) -> Floats | None:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    return tensor.detach().cpu().to(torch.float64, copy=True).numpy()


@dataclass
class Call:
    """How a layer is used in a forward."""

    calls: int = 0
    depth: int = 0
    shape: tuple[int, ...] = ()
    """of its (first) input"""
    before: str | None = None
    activation: str | None = None


@dataclass
class Trace:
    """What one forward shows."""

    used: dict[str, Call] = field(default_factory=dict)
    """by the layer's name, in the order of the first calls"""
    hidden: Counter[str] = field(default_factory=Counter)
    """batch_norm operations outside of the layers, by the name of the module whose forward calls them"""
    operations: int = 0
    """batch_norm operations in all"""
    reads: Counter[str] = field(default_factory=Counter)
    """how many modules and functions read the output of a module, by its name; views do not count"""


@torch.no_grad()
def trace(network: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object]) -> Trace:
    """Run a forward, and note how it uses the layers. The caller restores the model."""
    found = Trace()
    watcher = _Watcher(network, layers, found)
    with ExitStack() as stack:
        for name, module in network.named_modules():
            stack.enter_context(watcher.hooks(name, module))
        stack.enter_context(watcher)
        stack.enter_context(_Operations(watcher))
        run()
    return found


class _Watcher(TorchFunctionMode):
    """Notes which module made a value, and which modules and functions read it."""

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], found: Trace) -> None:
        super().__init__()
        self.found = found
        self.names = {module: name for name, module in layers.items()}
        self.made: dict[int, str] = {}  # memory -> the name of the module that wrote it last
        self.alive: list[Tensor] = []  # so that no memory is used again while it is known
        self.running: list[nn.Module] = []
        self.paths = {module: name for name, module in network.named_modules()}
        self.parameters = {_memory(p) for p in network.parameters()}
        self.sizes = {p.numel() for p in network.parameters()}

    @contextmanager
    def hooks(self, name: str, module: nn.Module) -> Iterator[None]:
        leaf = (module in self.names or not _has_children(module)) and not isinstance(module, _PASSING)

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(module)
            if not leaf:
                return
            sources = self.sources((args, kwargs))
            self.found.reads.update(sources)
            if module in self.names:
                self.note_call(self.names[module], args, kwargs, sources)
            else:
                self.note_activation(sources, type(module).__name__)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            self.running.pop()
            if leaf:
                self.write(output, name)

        first = module.register_forward_pre_hook(before, with_kwargs=True)
        last = module.register_forward_hook(after, always_call=True)
        try:
            yield
        finally:
            first.remove()
            last.remove()

    def note_call(self, name: str, args: Any, kwargs: Any, sources: list[str]) -> None:
        call = self.found.used.setdefault(name, Call(depth=len(self.found.used)))
        call.calls += 1
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if call.calls == 1 and x is not None:
            call.shape = tuple(x.shape)
            call.before = sources[0] if sources else None

    def note_activation(self, sources: list[str], function: str) -> None:
        activation = function.lower().removesuffix("_").replace("_", "")
        for source in sources if activation in ACTIVATIONS else ():
            if source in self.found.used:
                self.found.used[source].activation = activation

    def sources(self, values: Any) -> list[str]:
        """The names of the modules that made the values."""
        tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
        return [self.made[_memory(t)] for t in tensors if _memory(t) in self.made]

    def write(self, values: Any, name: str) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.alive.append(value)
                self.made[_memory(value)] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        layer = next((m for m in reversed(self.running) if m in self.names), None)
        if layer is None and self.running and not _has_children(self.running[-1]):
            return func(*args, **kwargs)  # within a module whose call is what counts
        sources = self.sources((args, kwargs))
        result = func(*args, **kwargs)
        if layer is not None and func in BATCH_NORM:  # in a layer's own forward, an activation may follow
            self.write(result, self.names[layer])
            return result
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and (not name.startswith("__") or name.startswith("__i"))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if sources and made and (in_place or kwargs.get("inplace") or not any(_memory(t) in self.made for t in made)):
            self.found.reads.update(sources)
            self.note_activation(sources, name)
            if in_place or kwargs.get("inplace"):
                for tensor in made:
                    self.made.pop(_memory(tensor), None)
        return result


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the batch_norm operations that run, whichever code calls them."""

    def __init__(self, watcher: _Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watcher = watcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if "batch_norm" in name and "backward" not in name and "update_stats" not in name:
            watcher = self.watcher
            watcher.found.operations += 1
            layer = any(module in watcher.names for module in watcher.running)
            x = next((arg for arg in args if isinstance(arg, Tensor)), None)
            # a standardised convolution normalises its weights by batch_norm
            of_weights = x is not None and (
                _memory(x) in watcher.parameters or (len(x) == 1 and x.ndim == 3 and x.numel() in watcher.sizes)
            )
            if not layer and not of_weights:
                watcher.found.hidden[watcher.paths[watcher.running[-1]] if watcher.running else ""] += 1
        return func(*args, **(kwargs or {}))


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def with_trace(layer: LayerEvidence, found: Trace, network: nn.Module) -> LayerEvidence:
    """The layer with what the trace shows of it."""
    call = found.used.get(layer.name)
    if call is None:
        return layer
    alone = found.reads[layer.name] == 1
    fields: dict[str, Any] = {
        "calls": call.calls,
        "depth": call.depth,
        "dims": len(call.shape),
        "values_per_image": math.prod(call.shape[2:]) if len(call.shape) > 1 else None,
        "activation": call.activation if alone else None,
        "before": call.before,
    }
    if call.before is not None:
        bias = getattr(network.get_submodule(call.before), "bias", None)
        if isinstance(bias, Tensor) and len(bias) == layer.channels:
            fields["before_bias"] = _array(bias)
        fields["before_shared"] = found.reads[call.before] > 1
    return replace(layer, **fields)
