"""Sees the operations of torch that normalise, whichever code calls them, and where the values in them come from.

Those of registered layers are known anyway; what is noted is the normalisation that the module tree does not show: of
layers that are built inside a forward or kept in a plain list, and of functions such as F.batch_norm. Values are known
by the memory that they are in.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnlab.norm.own_forward import BATCH_NORM
from bnlab.norm.whitening import Whitening

_INSTANCE_NORM: dict[Any, tuple[str, ...]] = {  # the functions, with the names of their parameters
    F.instance_norm: ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
    torch.instance_norm: ("input", "weight", "bias", "running_mean", "running_var", "use_input_stats"),
}
_OPERATIONS = {  # of torch, that normalise
    *("batch_norm", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_elemt"),
    *("_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit_functional"),
    *("_batch_norm_no_update", "_batch_norm_with_update", "_batch_norm_with_update_functional"),
}
_FACTORIES = {  # their result does not depend on the values of their arguments
    *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "lift_fresh"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"),
}

Origin = Literal["registered", "made", "data", "outside"]
"""of values. registered: parameters, buffers and what is computed of them alone; made: constants of the forward; data:
what depends on the input; outside: tensors that existed before, and are not registered"""


@dataclass(frozen=True)
class Hidden:
    """Normalisation that no registered layer does."""

    owner: str
    """name of the registered module whose forward calls it"""
    layer: str
    """class of the module that does it, which is not registered; "": a function does"""
    kind: Literal["batch", "instance"]
    statistics: Literal["none", "registered", "rebuilt", "outside"]
    """Where its running statistics are. none: it uses none; registered: in the module tree, so in the state_dict;
    rebuilt: each forward makes them anew; outside: in a tensor that is not registered"""
    by_batch: bool
    """whether it normalises by the statistics of its input, although the network is in evaluation"""


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within this context, operations are seen.

    Args:
        network: what runs, in evaluation mode.
        layers: its normalisation layers, whose operations are not noted.
        running: the registered modules whose forward is running, which the caller keeps up to date.
    """

    def __init__(self, network: nn.Module, layers: Mapping[str, nn.Module], running: list[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.paths = {module: name for name, module in network.named_modules()}
        self.layers, self.running = set(layers.values()), running
        self.hidden = Counter[Hidden]()
        self.outside: list[tuple[Tensor, Tensor]] = []  # statistics, with their values before the forward
        self.number = 0  # normalising operations in all
        self._unregistered: list[tuple[nn.Module, int]] = []  # running, each within so many registered modules
        self._calls: list[Mapping[str, Any]] = []  # normalising functions that run, by their parameters
        self._origins: dict[int, Origin] = {memory_of(t): "registered" for t in network.parameters()}
        self._origins |= {memory_of(t): "registered" for t in network.buffers()}
        self._images = 0  # of the input

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler at the first operation, which takes seconds

    def note_input(self, values: Any) -> None:
        """Note the input of the network."""
        for tensor in tensors_of(values):
            self._origins[memory_of(tensor)] = "data"
            self._images = self._images or (len(tensor) if tensor.ndim else 0)

    @contextmanager
    def within(self, func: Any, args: Any, kwargs: Any) -> Iterator[None]:
        """While a function runs: if it normalises, its arguments say more than those of the operation within it."""
        names = BATCH_NORM.get(func) or _INSTANCE_NORM.get(func)
        if names is None:
            yield
            return
        given = dict(zip(names, args, strict=False)) | kwargs
        self._calls.append({"use_input_stats": True, **given} if func in _INSTANCE_NORM else given)
        try:
            yield
        finally:
            self._calls.pop()

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """See the modules that are not registered."""
        seen: set[nn.Module] = set()

        def before(module: nn.Module, args: Any) -> None:
            if module in self.paths:
                return
            self._unregistered.append((module, len(self.running)))
            if module not in seen:
                seen.add(module)
                self._keep(b for b in module._buffers.values() if b is not None)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            if module not in self.paths and self._unregistered:
                self._unregistered.pop()

        first = register_module_forward_pre_hook(before)
        last = register_module_forward_hook(after, always_call=True)
        try:
            yield
        finally:
            first.remove()
            last.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in _OPERATIONS:
            given = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | kwargs
            by_batch = bool(given.get("training", "with_update" in name or "running_mean" not in given))
            self._note(given, by_batch)
        inputs = tensors_of((args, kwargs))
        origins = {self._origin(t) for t in inputs}
        result = func(*args, **kwargs)
        origin: Origin = "data"
        if origins <= {"made"} or name in _FACTORIES:
            origin = "made"
        elif origins <= {"registered", "made"}:
            origin = "registered"
        old = {memory_of(t) for t in inputs}
        for tensor in tensors_of(result):
            memory = memory_of(tensor)
            if memory not in old or name in _FACTORIES:
                self._origins[memory] = origin
            elif origin == "data" and func._schema.is_mutable and self._origins.get(memory) == "made":
                self._origins[memory] = "data"
        return result

    def _note(self, given: Mapping[str, Any], by_batch: bool) -> None:
        """Note one operation, with its arguments, that runs outside of the layers."""
        self.number += 1
        innermost = self.running[-1] if self.running else None
        if innermost in self.layers or any(isinstance(m, _BatchNorm | _InstanceNorm | Whitening) for m in self.running):
            return
        x = given["input"]
        if self._origin(x) != "data":
            return  # a standardised convolution normalises its weights by batch_norm
        call = self._calls[-1] if self._calls else given
        instance = "use_input_stats" in call or len(x) == 1 < self._images
        statistics = [t for t in (call.get("running_mean"), call.get("running_var")) if isinstance(t, Tensor)]
        where: dict[Origin, Literal["none", "registered", "rebuilt", "outside"]] = {
            "registered": "registered",
            "made": "rebuilt",
            "outside": "outside",
            "data": "none",
        }
        self._keep(t for t in statistics if self._origin(t) == "outside")
        unused = not statistics or (instance and by_batch)
        within = [module for module, depth in self._unregistered if depth == len(self.running)]
        self.hidden[
            Hidden(
                owner="" if innermost is None else self.paths[innermost],
                layer=type(within[-1]).__name__ if within else "",
                kind="instance" if instance else "batch",
                statistics="none" if unused else where[self._origin(statistics[0])],
                by_batch=by_batch,
            )
        ] += 1

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        known = {id(tensor) for tensor, _ in self.outside}
        self.outside += [(t, t.detach().clone()) for t in tensors if id(t) not in known]

    def _origin(self, tensor: Tensor) -> Origin:
        return self._origins.get(memory_of(tensor), "outside")


def tensors_of(values: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def memory_of(tensor: Tensor) -> int:
    """What is the same for a tensor and its views."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
