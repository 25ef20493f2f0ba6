"""Trace the graphs of a model, or of its parts where it cannot be traced as one, in which `fold` finds its layers.

What all graphs of a part show holds for every input, since each way of its forward is traced (`branches.py`).
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bnlab.norm.folding.branches import MAX_GRAPHS, BranchingTracer, each_way, first_sentence, own_graphs
from bnlab.norm.model_utils import copy_module, hooked

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE: dict[type[nn.Module], int] = {  # with the number of dimensions of their outputs
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    **dict(zip(TRANSPOSED, (3, 4, 5), strict=True)),
}


@dataclass(frozen=True)
class Region:
    """A part of the model, or all of it, that could be traced. Paths in it are relative to its module."""

    names: dict[nn.Module, str]  # of all modules of the model
    module: nn.Module
    shared: set[nn.Module]  # modules that are also part of something outside of the region
    graphs: list[fx.Graph] = field(default_factory=list)  # one for each way in which forward can run
    hooked_nodes: set[fx.Node] = field(default_factory=set)  # values that hooks read
    stored: set[fx.Node] = field(default_factory=set)  # values that forward stores in attributes
    read: set[str] = field(default_factory=set)  # the tensors that forward uses, other than through their module
    calls: set[nn.Module] = field(default_factory=set)  # the modules that forward calls, even where tracing fails

    @property
    def name(self) -> str:
        return self.names[self.module] or "the model"

    def nodes(self) -> Iterator[fx.Node]:
        return itertools.chain.from_iterable(graph.nodes for graph in self.graphs)

    def called(self, node: fx.Node) -> nn.Module | None:
        """Return the module that the node calls, if it calls one."""
        return self._modules[str(node.target)] if node.op == "call_module" else None

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self.module.named_modules(remove_duplicate=False))

    def reads(self, node: fx.Node) -> bool:
        """Whether forward uses the tensors of the module that the node calls."""
        return any(name.rpartition(".")[0] == node.target for name in self.read)

    def describe(self, node: fx.Node) -> str:
        """Return what the reasons for keeping a layer call the node."""
        module = self.called(node)
        if module is not None:
            return f"{self.names[module]} ({type(module).__name__})"
        if node.op == "placeholder":
            return f"the input of {self.name}"
        name = str(getattr(node.target, "__name__", node.target)).partition(".")[
            0
        ]  # an ATen operator's has an overload
        return f"{name}{'()' * (node.op != 'get_attr')}"


def trace_regions(model: nn.Module) -> tuple[list[Region], dict[nn.Module, str]]:
    """Trace the model or, if that fails, its parts; return also the layers in none of them, with the reason."""
    names = {module: name for name, module in model.named_modules()}
    regions: list[Region] = []
    untraced: dict[nn.Module, str] = {}
    seen: set[nn.Module] = set()

    def explore(module: nn.Module, reason: str, called: set[nn.Module]) -> None:
        if module in seen or not any(is_norm(m) or isinstance(m, tuple(FOLDABLE)) for m in module.modules()):
            return  # F.batch_norm needs a layer before it
        seen.add(module)
        if is_norm(module):
            untraced[module] = reason
        if is_leaf(module):
            return
        # A container of layers may be run layer by layer, unless a trace showed that it is called.
        if module in called or type(module).forward not in (nn.Module.forward, nn.Sequential.forward):
            region = Region(names, module, shared={other for _, other in model.named_modules(memo={module})})
            called = region.calls
            try:
                _trace(region)
            except (MemoryError, torch.OutOfMemoryError):
                raise
            except Exception as error:  # of any type: it ran the model's own code on proxies
                reason = f"{region.name} cannot be traced without an example: {first_sentence(error)}"
            else:
                regions.append(region)
                return
        for child in module.children():
            explore(child, reason, called)

    with torch.random.fork_rng(devices=[]), torch.no_grad():  # forward may draw numbers
        explore(model, "it is the model itself", {model})
    return regions, untraced


def is_norm(module: nn.Module) -> bool:
    """Whether it is batch normalisation, as a layer of torch.nn's or as a module that keeps statistics in tensors."""
    if isinstance(module, _BatchNorm):
        return True
    if any(isinstance(inner, (_InstanceNorm, *FOLDABLE)) for inner in module.modules()):
        return False
    kept = vars(module) | module._parameters | module._buffers  # a trace notes what is read as an attribute
    statistics = (kept.get("running_mean"), kept.get("running_var"))
    return all(isinstance(tensor, Tensor) for tensor in statistics)


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph shows its call, not what it does: it is batch normalisation, or may take its scale and shift."""
    if is_norm(module) or has_plain_forward(module):
        return True
    if not isinstance(module, tuple(FOLDABLE)) or any(module.children()):
        return False
    try:
        own_graphs(module)  # it uses no tensors but its own
    except Exception:  # of any type: it ran the model's own code on proxies
        return False
    return True


# The graphs of a region.

_ANOTHER_VALUE = object()


def _trace(region: Region) -> None:
    """Add a graph for every way in which forward can run."""
    module = region.module
    if "forward" in vars(module):
        raise TraceError("its forward was replaced")

    def trace(tracer: "_Tracer") -> fx.Graph:
        # Trace a copy, since forward may change attributes; the copy shares the parameters, which are large.
        scratch = copy_module(module, module.parameters())
        with _Reads(tracer.read):
            graph = tracer.trace(scratch)
        region.stored.update(node for m in scratch.modules() for node in _nodes_in(list(vars(m).values())))
        tensors = [*scratch.named_parameters(remove_duplicate=False), *scratch.named_buffers(remove_duplicate=False)]
        region.read.update(name for name, tensor in tensors if any(tensor is other for other in tracer.read))
        return graph

    for optional in _ways_to_call(module):
        region.graphs.extend(each_way(partial(_Tracer, region, optional), trace))
        if len(region.graphs) > MAX_GRAPHS:
            raise TraceError(f"its forward has more than {MAX_GRAPHS} ways to run")


def _ways_to_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Yield the combinations of forward's optional arguments, each at its default and at another value."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TraceError("its forward takes any number of arguments")
    optional = [p for p in parameters if p.default is not p.empty]
    if len(optional) > 4:
        raise TraceError("its forward has more than four optional arguments")
    choices = [(p.default, not p.default if isinstance(p.default, bool) else _ANOTHER_VALUE) for p in optional]
    for chosen in itertools.product(*choices):
        yield {p.name: value for p, value in zip(optional, chosen, strict=True)}


class _Tracer(BranchingTracer):
    def __init__(self, region: Region, optional: dict[str, Any], decided: tuple[bool, ...]) -> None:
        super().__init__(decided)
        self.region, self.optional = region, optional
        self.read: list[Tensor] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m) or (
            super().is_leaf_module(m, module_qualified_name) and not any(is_norm(inner) for inner in m.modules())
        )

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.region.calls.add(self.region.module.get_submodule(self.path_of_module(m)))
        result = super().call_module(m, m.forward, args, kwargs)  # without hooks, which do not expect proxies
        if hooked(m):
            self.region.hooked_nodes.update(_nodes_in([*args, *kwargs.values(), result]))
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        given = dict(self.optional)
        for name in list(inspect.signature(root_fn).parameters)[1:]:
            if given.get(name, _ANOTHER_VALUE) is _ANOTHER_VALUE:
                given[name] = self.create_proxy("placeholder", name, (), {})
        return lambda: root_fn(self.root, **given), []

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        self._note(attr_val)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        self._note(a)
        return super().create_arg(a)

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self.read.append(value)


class _Reads(TorchFunctionMode):
    """Notes the tensors that forward computes with, also those that it found in `parameters()`."""

    def __init__(self, read: list[Tensor]) -> None:
        super().__init__()
        self.read = read

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":  # such as `shape` or `dtype`
            self.read += [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        return func(*args, **(kwargs or {}))


def _nodes_in(values: list[Any]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    map_aggregate(values, lambda value: found.add(value.node) if isinstance(value, Proxy) else None)
    return found


def has_plain_forward(layer: nn.Module) -> bool:
    """Whether it computes what torch.nn's layer of its type does."""
    for kind in FOLDABLE:
        if isinstance(layer, kind):
            methods = [m for m in ("forward", "_conv_forward") if hasattr(kind, m)]
            return all(getattr(type(layer), m) is getattr(kind, m) and m not in vars(layer) for m in methods)
    return False
