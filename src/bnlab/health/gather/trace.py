"""Sees in one forward of a few images how a network uses its layers, and what normalises beside them.

Values are known by the memory that they are in, because a view of a layer's output is still its output.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnlab.health.gather.operations import Hidden, Operations, memory_of, tensors_of
from bnlab.norm.own_forward import BATCH_NORM

ACTIVATIONS = {"relu", "relu6", "leakyrelu", "elu", "selu", "silu", "gelu", "hardswish", "sigmoid", "tanh"}
_LINEAR = (nn.modules.conv._ConvNd, nn.Linear)
_PASSING = (nn.Identity, nn.modules.dropout._DropoutNd)  # in evaluation, these return their input


@dataclass
class Call:
    """How a layer is used in a forward."""

    calls: int = 0
    depth: int = 0
    shape: tuple[int, ...] = ()
    """of its (first) input"""
    inputs: int = 1
    """how many tensors it is called with"""
    before: str | None = None
    same_channels: bool = False
    """whether its channels are those of the convolution or linear layer before it, in the same order"""
    activation: str | None = None
    activates: bool = False
    """whether the activation is a part of the layer, such as of timm's BatchNormAct2d"""


@dataclass
class Trace:
    """What one forward shows."""

    used: dict[str, Call] = field(default_factory=dict)
    """by the layer's name, in the order of the first calls"""
    hidden: Counter[Hidden] = field(default_factory=Counter)
    """how often each normalisation outside of the layers is called"""
    operations: int = 0
    """batch_norm operations in all"""
    reads: Counter[str] = field(default_factory=Counter)
    """how many modules and functions read the output of a module, by its name; views do not count"""
    dropped: set[str] = field(default_factory=set)
    """names of the modules whose output goes through dropout"""
    outside: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """statistics that are not registered, each with its values before the forward"""

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the statistics that are not registered, which `restored` does not know of."""
        for tensor, values in self.outside:
            tensor.copy_(values)


@torch.no_grad()
def trace(network: nn.Module, layers: Mapping[str, nn.Module], run: Callable[[], object]) -> Trace:
    """Run a forward, and note how it uses the layers. The caller restores the model, and what `Trace` restores."""
    found = Trace()
    watcher = _Watcher(network, layers, found)
    operations = watcher.operations
    found.hidden, found.outside = operations.hidden, operations.outside
    try:
        with ExitStack() as stack:
            for name, module in network.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it takes no hooks
                stack.enter_context(watcher.hooks(name, module))
            stack.enter_context(operations.hooks())
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="Using `torch.compile", category=UserWarning)  # of those hooks
            stack.enter_context(watcher)
            stack.enter_context(operations)
            run()
    except BaseException:
        found.restore()
        raise
    found.operations = operations.number
    return found


class _Watcher(TorchFunctionMode):
    """Notes which module made a value, and which modules and functions read it."""

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], found: Trace) -> None:
        super().__init__()
        self.found = found
        self.names = {module: name for name, module in layers.items()}
        self.made: dict[int, str] = {}  # memory -> the name of the module that wrote it last
        self.alive: list[Tensor] = []  # so that no memory is used again while it is known
        self.strides: dict[str, int] = {}  # of the channels, in the output of a convolution or linear layer
        self.running: list[nn.Module] = []
        self.operations = Operations(network, layers, self.running)

    @contextmanager
    def hooks(self, name: str, module: nn.Module) -> Iterator[None]:
        leaf = (module in self.names or not _has_children(module)) and not isinstance(module, _PASSING)
        inputs: list[list[tuple[int, int | None]]] = []  # of the calls that run: memory and version

        def before(_: nn.Module, args: Any, kwargs: Any) -> None:
            self.running.append(module)
            if not name:
                self.operations.note_input((args, kwargs))
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                self.found.dropped.update(self.sources((args, kwargs)))
            if not leaf:
                return
            inputs.append([(memory_of(t), _version(t)) for t in tensors_of((args, kwargs))])
            sources = self.sources((args, kwargs))
            self.found.reads.update(sources)
            if module in self.names:
                self.note_call(self.names[module], args, kwargs, sources)
            else:
                self.note_activation(sources, type(module).__name__)

        def after(_: nn.Module, args: Any, output: Any) -> None:
            self.running.pop()
            given = inputs.pop() if leaf else []
            if not leaf:
                return
            outputs = [(memory_of(t), _version(t)) for t in tensors_of(output)]
            if module not in self.names and outputs and all(one in given for one in outputs):
                self.found.reads.subtract(self.made[memory] for memory, _ in outputs if memory in self.made)
                return  # it returned its input, or a view of it
            self.write(output, name)
            if isinstance(module, _LINEAR) and isinstance(output, Tensor) and output.ndim > 1:
                self.strides[name] = output.stride(-1 if isinstance(module, nn.Linear) else 1)

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
        given = list(tensors_of((args, kwargs)))
        x = given[0] if given else None
        call.inputs = max(call.inputs, len(given))
        if call.calls == 1 and x is not None:
            call.shape = tuple(x.shape)
            call.before = sources[0] if sources else None
            call.same_channels = x.ndim > 1 and x.stride(1) == self.strides.get(call.before or "")

    def note_activation(self, sources: list[str], function: str) -> None:
        activation = function.lower().removesuffix("_").replace("_", "")
        for source in sources if activation in ACTIVATIONS else ():
            call = self.found.used.get(source)
            if call is not None and not call.activates:
                call.activation = activation
                call.activates = any(self.names.get(module) == source for module in self.running)

    def sources(self, values: Any) -> list[str]:
        """The names of the modules that made the values."""
        return [self.made[memory_of(t)] for t in tensors_of(values) if memory_of(t) in self.made]

    def write(self, values: Any, name: str) -> None:
        for value in tensors_of(values):
            self.alive.append(value)
            self.made[memory_of(value)] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self.operations.within(func, args, kwargs):
            return self.watched(func, args, kwargs)

    def watched(self, func: Any, args: Any, kwargs: Any) -> Any:
        layer = next((m for m in reversed(self.running) if m in self.names), None)
        if layer is None and self.running and not _has_children(self.running[-1]):
            return func(*args, **kwargs)  # within a module whose call is what counts
        sources = self.sources((args, kwargs))
        result = func(*args, **kwargs)
        if layer is not None and func in BATCH_NORM:  # in a layer's own forward, an activation may follow
            self.write(result, self.names[layer])
            return result
        name = getattr(func, "__name__", "")
        if "dropout" in name:
            self.found.dropped.update(sources)
        in_place = name.endswith("_") and (not name.startswith("__") or name.startswith("__i"))
        made = tensors_of(result)
        if sources and made and (in_place or kwargs.get("inplace") or not any(memory_of(t) in self.made for t in made)):
            self.found.reads.update(sources)
            self.note_activation(sources, name)
            if in_place or kwargs.get("inplace"):
                for tensor in made:
                    self.made.pop(memory_of(tensor), None)
        return result


def _has_children(module: nn.Module) -> bool:
    return any(True for _ in module.children())


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
