"""Record what a model does with an example, as a graph: the calls of its layers, and the operations between them.

It shows what no trace does: the outcome of control flow, for inputs like the example. Values are known by the memory
that they are in, so that a view counts as a use of what it views.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bnlab.norm.folding.trace import Region, is_leaf
from bnlab.norm.model_utils import copy_module, hooked


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, region: Region, scratch: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.region, self.graph = region, fx.Graph()
        self.made: dict[int, fx.Node] = {}  # what last wrote the memory
        self.within = 0  # how many recorded modules are running
        tensors = [*scratch.named_parameters(), *scratch.named_buffers()]
        self.parameters = {_memory(tensor): name for name, tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.within:
            node = self.graph.call_function(func, *self.nodes((tuple(args), kwargs or {})))
            self.region.read.update(
                self.parameters[_memory(part)]
                for part in tree_leaves((args, kwargs))
                if isinstance(part, Tensor) and _memory(part) in self.parameters
            )
            self.note(result, node)
            if func._schema.is_mutable:
                self.note(args, node)
        return result

    def note(self, values: Any, node: fx.Node) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor):
                self.made[_memory(value)] = node

    def nodes(self, values: Any) -> Any:
        """Return the values with nodes for tensors; of what is not an argument for a graph, its text."""

        def node_of(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.made.get(_memory(value), "a tensor")
            return value if isinstance(value, (int, float, bool, type(None), str)) else str(value)

        return tree_map(node_of, values)

    def watch(self, module: nn.Module, name: str) -> None:
        """Record the calls of a layer, and what hooks on any module read."""
        has_hooks, leaf = hooked(module), is_leaf(module)

        def before(*_: Any) -> None:
            self.within += leaf

        def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if has_hooks:
                self.region.hooked_nodes.update(
                    node for node in tree_leaves(self.nodes((args, kwargs, output))) if isinstance(node, fx.Node)
                )
            if not leaf:
                return
            self.within -= 1
            if not self.within:
                args, kwargs = self.nodes((tuple(args), kwargs))
                self.note(output, self.graph.create_node("call_module", name, args, kwargs))

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after, with_kwargs=True)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


@torch.no_grad()
def record(model: nn.Module, run: Callable[[nn.Module, tuple[Any, ...]], Any], example: tuple[Any, ...]) -> Region:
    """Return the graphs of `run(model, example)`, and of other batch and image sizes that the model can take.

    Control flow on a shape may do something else for them.
    """
    region = Region({module: name for name, module in model.named_modules()}, model, shared=set())
    _record(region, run, example)
    for other in (lambda x: x[:1], lambda x: torch.cat([x, x]), _smaller):
        known = len(region.graphs), set(region.read)
        try:
            _record(region, run, tree_map(lambda x, change=other: change(x) if _is_batch(x) else x, example))
        except Exception:  # of any type: it ran the model's own code, which may not take this size
            del region.graphs[known[0] :]
            region.read.intersection_update(known[1])
    return region


def _is_batch(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 1


def _smaller(x: Tensor) -> Tensor:
    return x[..., : -(-x.shape[-2] // 2), : -(-x.shape[-1] // 2)] if x.ndim > 3 else x


def _record(region: Region, run: Callable[[nn.Module, tuple[Any, ...]], Any], example: tuple[Any, ...]) -> None:
    scratch = copy_module(region.module)  # since forward may change attributes
    inputs = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, example)
    recorder = _Recorder(region, scratch)
    for tensor in tree_leaves(inputs):
        if isinstance(tensor, Tensor):
            recorder.note(tensor, recorder.graph.placeholder("input"))
    for name, module in scratch.named_modules():
        recorder.watch(module, name)
    with recorder:
        output = run(scratch, inputs)
    recorder.graph.output(recorder.nodes(tree_leaves(output)))
    kept = tree_leaves([list(vars(module).values()) for module in scratch.modules()])
    region.stored.update(
        recorder.made[_memory(value)] for value in kept if isinstance(value, Tensor) and _memory(value) in recorder.made
    )
    region.graphs.append(recorder.graph)
