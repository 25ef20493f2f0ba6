"""What a module's own forward does to each channel: the batch normalisation in it, and what is left without that.

The forward is traced, with the modules that it calls as single nodes. Of the operations on one value those are taken
that multiply each channel by a stored number or add one, such as F.batch_norm by stored statistics. What follows, an
activation say, is left as it is.
"""

import copy
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm.folding.branches import first_sentence, own_graphs
from bnlab.norm.folding.flow import CannotFold, readers
from bnlab.norm.folding.trace import FOLDABLE, has_plain_forward
from bnlab.norm.folding.weights import Affine, exact
from bnlab.norm.own_forward import BATCH_NORM

_ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply, "mul"), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, torch.true_divide, "div"), "div"),
    **dict.fromkeys((operator.add, torch.add, "add"), "add"),
    **dict.fromkeys((operator.sub, torch.sub, torch.subtract, "sub"), "sub"),
}
_CONVOLUTIONS = (F.linear, F.conv1d, F.conv2d, F.conv3d)
_CHECKS = (operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem, getattr)


def affine_of(norm: _BatchNorm) -> Affine:
    """Return what a layer does that computes batch normalisation and nothing else."""
    assert norm.running_mean is not None and norm.running_var is not None
    return _batch_norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)


def _batch_norm(mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Affine:
    mean, var = exact(mean), exact(var)  # C
    scale = (var + eps).rsqrt() * (1 if weight is None else exact(weight))
    return Affine(scale, mean, torch.zeros_like(mean) if bias is None else exact(bias))


class Operations(NamedTuple):
    """Operations of a forward that together are one affine function of each channel."""

    graph: fx.Graph
    input: fx.Node
    output: fx.Node
    affine: Affine


def operations(module: nn.Module, dims: int, channels: int, which: int | None = None) -> Operations:
    """Return those at the start of the module's forward, or from its F.batch_norm number `which` on.

    `dims` is the number of dimensions of what they are given, and `channels` how many channels it has.
    """
    kind = type(module).__name__
    try:
        graphs = own_graphs(module)
    except Exception as error:  # of any type: it ran the model's own code on proxies
        raise CannotFold(f"{kind} overrides forward, which cannot be traced: {first_sentence(error)}") from None
    if len(graphs) > 1:
        raise CannotFold(f"{kind} overrides forward, which branches on its input")
    graph = graphs[0]
    if which is None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if len(inputs) != 1:
            raise CannotFold(f"{kind} overrides forward, with {len(inputs)} arguments")
        value = inputs[0]
    else:
        value = [node for node in graph.nodes if node.target in BATCH_NORM][which]
        value = batch_norm_arguments(value)["input"]
    start, stored = value, _stored_values(graph, module)
    zeros = torch.zeros(channels, dtype=torch.float64)
    affine = Affine(zeros + 1, zeros, zeros)
    while value not in graph.output_node().all_input_nodes and len(users := readers(value)) == 1:
        step = _step(users[0], value, affine, stored, dims)
        if step is None:
            break
        value, affine = users[0], step
        if which is not None:
            break
    if value is start:
        what = "its forward does not begin with batch normalisation by stored statistics"
        raise CannotFold(f"{kind} overrides forward, and {what}" if which is None else _FUNCTION)
    return Operations(graph, start, value, affine)


_FUNCTION = "it is a function whose parameters and statistics are not all stored in the model"


def _step(node: fx.Node, value: fx.Node, before: Affine, stored: dict[fx.Node, Any], dims: int) -> Affine | None:
    """Return `before` and the node's operation on `value` as one, if it is affine for each channel."""

    def number(of: Any) -> Any:
        return stored.get(of) if isinstance(of, fx.Node) else of

    channels = len(before.scale)
    if node.target in BATCH_NORM:
        given = batch_norm_arguments(node)
        mean, var, weight, bias, eps = (
            number(given[n]) for n in ("running_mean", "running_var", "weight", "bias", "eps")
        )
        missing = any(number(of) is None and of is not None for of in given.values() if of is not value)
        tensors = [tensor for tensor in (mean, var, weight, bias) if tensor is not None]
        if given["training"] is not False or mean is None or var is None or missing or given["input"] is not value:
            return None
        if not all(isinstance(tensor, Tensor) and tensor.shape == (channels,) for tensor in tensors):
            return None
        norm = _batch_norm(mean, var, weight, bias, float(eps))
        if bool((before.scale == 1).all() and (before.mean == 0).all() and (before.beta == 0).all()):
            return norm  # to the bit
        return Affine(before.scale * norm.scale, before.mean, (before.beta - norm.mean) * norm.scale + norm.beta)
    kind = _ARITHMETIC.get(node.target)
    if kind is None or node.op not in ("call_function", "call_method") or len(node.args) != 2 or node.kwargs:
        return None
    left, right = node.args
    factor = _by_channel(number(right if left is value else left), channels, dims)
    if factor is None or (left is value) == (right is value):
        return None
    scale, mean, beta = before
    if kind == "mul":
        return Affine(scale * factor, mean, beta * factor)
    if kind == "div":
        return Affine(scale / factor, mean, beta / factor) if left is value else None
    if kind == "sub":
        return Affine(scale, mean, beta - factor) if left is value else Affine(-scale, mean, factor - beta)
    return Affine(scale, mean, beta + factor)


def _by_channel(number: Any, channels: int, dims: int) -> Tensor | None:
    """Return what a number or tensor is for each channel of a value with `dims` dimensions, if nothing else matters."""
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return torch.tensor(number, dtype=torch.float64)
    if not isinstance(number, Tensor) or not number.is_floating_point() or number.ndim > dims:
        return None
    shape = (*[1] * (dims - number.ndim), *number.shape)
    if any(size != 1 for i, size in enumerate(shape) if i != 1) or shape[1] not in (1, channels):
        return None
    return exact(number).flatten().expand(channels)


def batch_norm_arguments(node: fx.Node) -> dict[str, Any]:
    """Return the arguments of a call of F.batch_norm or torch.batch_norm by the names that the former has."""
    defaults = dict.fromkeys(BATCH_NORM[F.batch_norm]) | {"training": False, "momentum": 0.1, "eps": 1e-5}
    return defaults | dict(zip(BATCH_NORM[node.target], node.args, strict=False)) | node.kwargs


def _stored_values(graph: fx.Graph, module: nn.Module) -> dict[fx.Node, Any]:
    """Return the values of the nodes that stored tensors alone decide, in float64."""

    def evaluate() -> dict[fx.Node, Any]:
        values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if node.op == "get_attr":
                owner, _, name = str(node.target).rpartition(".")
                found = getattr(module.get_submodule(owner), name, None)  # None of what the trace itself computed
                if isinstance(found, Tensor):
                    values[node] = exact(found) if found.is_floating_point() else found.detach().cpu()
            elif node.op in ("call_function", "call_method") and (inputs := node.all_input_nodes):
                if not all(part in values for part in inputs):
                    continue
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda part: values[part])
                if node.op == "call_function":
                    values[node] = node.target(*args, **kwargs)
                else:
                    values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return values

    def same(one: Any, other: Any) -> bool:
        return torch.equal(one, other) if isinstance(one, Tensor) else bool(one == other)

    if any(_changes_stored(node) for node in graph.nodes):
        return {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            first, again = evaluate(), evaluate()
        except Exception:  # of any type: it ran the model's own code
            return {}
    return {node: value for node, value in first.items() if same(value, again[node])}  # not what it draws


class Remainder(fx.GraphModule):
    """What a module does besides batch normalisation."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        new = super().__deepcopy__(memo)  # of what the graph uses
        for name, value in vars(self).items():
            if name not in vars(new):
                setattr(new, name, copy.deepcopy(value, memo))
        return new


def _changes_stored(node: fx.Node) -> bool:
    """Whether the node writes into a stored tensor, or a view of one."""
    name = str(getattr(node.target, "__name__", node.target))
    in_place = (name.endswith("_") and not name.endswith("__")) or name in (
        "iadd",
        "isub",
        "imul",
        "itruediv",
        "setitem",
    )
    return in_place and bool(node.args) and isinstance(node.args[0], fx.Node) and _only_stored(node.args[0])


def without(module: nn.Module, found: Operations, replacement: nn.Module) -> nn.Module:
    """Return what the module does when `replacement` stands for the operations; it alone where nothing is left."""
    graph = found.graph
    name = "batch_norm"
    while hasattr(module, name):
        name += "_"
    module.add_module(name, replacement)
    with graph.inserting_before(found.output):
        new = graph.call_module(name, (found.input,))
    found.output.replace_all_uses_with(new)
    pure = (*_CHECKS, *BATCH_NORM, *_ARITHMETIC, "size", "dim")
    for node in reversed(list(graph.nodes)):  # what only the operations and the checks of their input used
        if not node.users and (node is found.output or node.target in pure or _only_stored(node)):
            graph.erase_node(node)
    if graph.output_node().args == (new,) and len(graph.nodes) == 3:  # the input, the replacement and the output
        return replacement
    graph._tracer_cls = None  # so that pickle uses torch's own
    return Remainder(module, graph, class_name=type(module).__name__)


def _only_stored(node: fx.Node) -> bool:
    """Whether the node is computed of stored tensors alone, like the reshaped statistics of a frozen layer."""
    if node.op == "get_attr":
        return True
    inputs = node.all_input_nodes
    return node.op in ("call_function", "call_method") and bool(inputs) and all(map(_only_stored, inputs))


def scales_with_parameters(layer: nn.Module) -> bool:
    """Whether a layer's output is its weight, applied linearly to something of its input, plus its bias.

    So it is for torch.nn's layers, and for subclasses that pad the input, say, before they convolve it.
    """
    if has_plain_forward(layer):
        return True
    if not isinstance(layer, tuple(FOLDABLE)) or "forward" in vars(layer):
        return False
    scratch = copy.copy(layer)
    scratch._parameters = dict(layer._parameters)
    if scratch._parameters.get("bias", 0) is None:  # folding gives it one, which forward must use
        width = getattr(layer, "out_features" if isinstance(layer, nn.Linear) else "out_channels")
        scratch._parameters["bias"] = nn.Parameter(torch.zeros(width))
    try:
        graphs = own_graphs(scratch)
    except Exception:  # of any type: it ran the model's own code on proxies
        return False
    return all(_scales(graph) for graph in graphs)


def _scales(graph: fx.Graph) -> bool:
    (result,) = graph.output_node().args
    tensors = {node for node in graph.nodes if node.op == "get_attr" and node.target in ("weight", "bias")}
    if not isinstance(result, fx.Node) or result.target not in _CONVOLUTIONS:
        return False
    given = dict(zip(("input", "weight", "bias"), result.args, strict=False)) | result.kwargs
    weight, bias = given.get("weight"), given.get("bias")
    if not isinstance(weight, fx.Node) or not isinstance(bias, fx.Node) or given.get("input") in tensors:
        return False
    if (weight.target, bias.target) != ("weight", "bias") or not {weight, bias} <= tensors:
        return False
    return all(set(readers(node)) <= {result} for node in tensors)
