"""The graphs of a model, or of its parts where it cannot be traced as a whole, for `fold` to read pairs off."""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm.models import hooked

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS: dict[type[nn.Module], int] = {  # and the dimensions of their outputs
    nn.Linear: 2,
    nn.Conv1d: 3,
    nn.Conv2d: 4,
    nn.Conv3d: 5,
    **dict(zip(TRANSPOSED, (3, 4, 5), strict=True)),
}


@dataclass(frozen=True)
class Region:
    """A part of the model, or all of it, that could be traced. Paths in it begin at its module."""

    names: dict[nn.Module, str]
    """of all the model's modules"""
    module: nn.Module
    shared: set[nn.Module]
    """modules that are held outside of it, too"""
    graphs: list[fx.Graph] = field(default_factory=list)
    """one for each way in which its forward can run"""
    watched: set[fx.Node] = field(default_factory=set)
    """what hooks get to see"""
    stored: set[fx.Node] = field(default_factory=set)
    """what forward leaves behind in attributes"""
    read: set[str] = field(default_factory=set)
    """the tensors that forward uses itself, not through their module"""

    @property
    def name(self) -> str:
        """What reasons call it."""
        return self.names[self.module] or "the model"

    def nodes(self) -> Iterator[fx.Node]:
        """Those of all its graphs."""
        return itertools.chain.from_iterable(graph.nodes for graph in self.graphs)

    def called(self, node: fx.Node) -> nn.Module | None:
        """The module that the node calls, if it calls one."""
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def reads(self, node: fx.Node) -> bool:
        """Whether forward uses the tensors of the module that the node calls."""
        return any(name.rpartition(".")[0] == node.target for name in self.read)

    def describe(self, node: fx.Node) -> str:
        """What reasons call the node."""
        module = self.called(node)
        if module is not None:
            return f"{self.names[module]} ({type(module).__name__})"
        if node.op == "placeholder":
            return f"the input of {self.name}"
        return f"{getattr(node.target, '__name__', node.target)}{'()' * (node.op != 'get_attr')}"


def survey(model: nn.Module) -> tuple[list[Region], dict[nn.Module, str]]:
    """Trace the model, or, if it cannot be, its parts; and the layers in none of them, with the reason."""
    names = {module: name for name, module in model.named_modules()}
    regions: list[Region] = []
    untraced: dict[nn.Module, str] = {}
    seen: set[nn.Module] = set()

    def explore(module: nn.Module, reason: str, called: set[nn.Module]) -> None:
        if module in seen or not _norms(module):
            return
        seen.add(module)
        if isinstance(module, _BatchNorm):
            untraced[module] = reason
            return
        # What only holds layers may be run layer by layer, unless it was seen to be called.
        if module in called or type(module).forward not in (nn.Module.forward, nn.Sequential.forward):
            called = set()
            region = Region(names, module, _outside(module, model))
            try:
                _trace(region, called)
            except Exception as error:  # the model's own code has run, on what it is not made for
                lines = str(error).splitlines() or [type(error).__name__]
                reason = f"{region.name} cannot be traced: {lines[0]}"
            else:
                regions.append(region)
                return
        for child in module.children():
            explore(child, reason, called)

    with torch.random.fork_rng(devices=[]), torch.no_grad():  # forward may draw numbers
        explore(model, "it is the whole model", {model})
    return regions, untraced


def _norms(module: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _outside(part: nn.Module, model: nn.Module) -> set[nn.Module]:
    found: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module is not part and module not in found:
            found.add(module)
            waiting.extend(module.children())
    return found


_GIVEN = object()


def _trace(region: Region, called: set[nn.Module]) -> None:
    """Add every way in which it can run; `called` gets the modules that it calls, also where it fails."""
    module = region.module
    if "forward" in vars(module):
        raise TraceError("its forward was replaced")
    for optional in _ways_to_call(module):
        # On another copy, since forward may leave marks; it shares the parameters, which are large.
        scratch = copy.deepcopy(module, {id(p): p for p in module.parameters()})
        tracer = _Tracer(optional)
        try:
            region.graphs.append(tracer.trace(scratch))
        finally:
            called |= {module.get_submodule(path) for path in tracer.called}
        region.watched.update(tracer.watched)
        region.stored.update(node for m in scratch.modules() for node in _nodes_in(list(vars(m).values())))
        tensors = [*scratch.named_parameters(remove_duplicate=False), *scratch.named_buffers(remove_duplicate=False)]
        region.read.update(name for name, tensor in tensors if any(tensor is other for other in tracer.read))


def _ways_to_call(module: nn.Module) -> Iterator[dict[str, Any]]:
    """The optional arguments of its forward: each at its default and not."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise TraceError("its forward takes any number of arguments")
    optional = [p for p in parameters if p.default is not p.empty]
    if len(optional) > 4:
        raise TraceError("its forward has more than four optional arguments")
    choices = [(p.default, not p.default if isinstance(p.default, bool) else _GIVEN) for p in optional]
    for chosen in itertools.product(*choices):
        yield {p.name: value for p, value in zip(optional, chosen, strict=True)}


class _Tracer(fx.Tracer):
    def __init__(self, optional: dict[str, Any]) -> None:
        super().__init__()
        self.optional = optional
        self.called: set[str] = set()
        self.watched: set[fx.Node] = set()
        self.read: list[Tensor] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _BatchNorm) or plain(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not _norms(m)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.called.add(self.path_of_module(m))
        result = super().call_module(m, m.forward, args, kwargs)  # without hooks, which are not made for proxies
        if hooked(m):
            self.watched.update(_nodes_in([*args, *kwargs.values(), result]))
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        given = dict(self.optional)
        for name in list(inspect.signature(root_fn).parameters)[1:]:
            if given.get(name, _GIVEN) is _GIVEN:
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


def _nodes_in(values: list[Any]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    map_aggregate(values, lambda value: found.add(value.node) if isinstance(value, Proxy) else None)
    return found


def plain(layer: nn.Module) -> bool:
    """Whether it computes what torch.nn's layer of its kind does."""
    for kind in LAYERS:
        if isinstance(layer, kind):
            methods = [m for m in ("forward", "_conv_forward") if hasattr(kind, m)]
            return all(getattr(type(layer), m) is getattr(kind, m) and m not in vars(layer) for m in methods)
    return False
