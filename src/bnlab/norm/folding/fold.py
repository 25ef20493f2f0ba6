"""Fold batch normalisation into the convolution or linear layer before it, for inference.

With stored statistics batch normalisation is a linear function of each channel, as is the layer before it:

    scale = gamma / sqrt(var + eps)        W -> W * scale        b -> (b - mean) * scale + beta

(arXiv 1502.03167, Alg. 2, step 11, applied to the weights), computed in float64. A graph shows which layer comes
before: torch.fx traces it (`trace.py`), or it is recorded while an `example` is run (`record.py`). A layer
after a concatenation is folded slice by slice into each of the layers before it (`flow.py`). Where no layer comes
before, a layer right after takes the scale and shift, if it does not pad with zeros. Of a module that normalises and
then does more, an activation say, the rest is left (`affine.py`). Where anything else may read the values between
the two layers, or where there is no graph, the layer is kept, and the reason is given.

A graph does not show everything. `fold` assumes the following, or checks it with an `example`: the model is run
through `forward`; its branches do not depend on attributes that change, or on the type of a value; it does not compute
weights outside of its layers; where it cannot be traced as one, each part that overrides forward is run through
that forward; and what cannot be traced at all runs the same layers for other inputs as for the example.

Shapes: N examples, C channels, then any number of positions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from bnlab.norm.folding.affine import Operations, affine_of, operations, scales_with_parameters, without
from bnlab.norm.folding.branches import own_graphs
from bnlab.norm.folding.check import check_outputs, run
from bnlab.norm.folding.flow import CannotFold, input_of, layer_after, readers, sources
from bnlab.norm.folding.record import record
from bnlab.norm.folding.trace import Region, has_plain_forward, is_norm, trace_regions
from bnlab.norm.folding.weights import Affine, fold_into, fold_into_next, widths
from bnlab.norm.layers import BatchNorm, is_plain
from bnlab.norm.model_utils import copy_module, hooked, unwrap_model
from bnlab.norm.own_forward import BATCH_NORM

_SHAPES = {2: "N x C", 3: "N x C x L", 4: "N x C x H x W", 5: "N x C x D x H x W"}


class Folded(nn.Module):
    """Replaces a layer that was folded into `layers`: the identity, or ReLU where the layer was called with relu=True.

    Raises:
        ValueError: the input does not have `dims` dimensions, so that its channels are not those of `layers` (the
            features of a linear layer come last, but batch normalisation takes the second dimension).
    """

    def __init__(self, name: str, layers: tuple[str, ...], dims: int) -> None:
        super().__init__()
        self.name, self.layers, self.dims = name, layers, dims
        self.refusal = (
            f"{name} was folded into {', '.join(layers)} for {_SHAPES[dims]}, and got another number of dimensions: "
            "run the model that was not folded"
        )
        self.eval()

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """Return the input, N x C x ...; ReLU is in place, since nothing else uses the input."""
        if input.dim() != self.dims:
            raise ValueError(self.refusal)
        return F.relu(input, inplace=True) if relu else input

    def extra_repr(self) -> str:
        return f"into {', '.join(self.layers)}"


@dataclass(frozen=True)
class Folding:
    model: nn.Module
    """a copy of the model in evaluation mode; it has fewer tensors, so it cannot load a checkpoint of the original"""
    folded: dict[str, tuple[str, ...]]
    """each layer that was folded, with the layers that it was folded into"""
    kept: dict[str, str]
    """each layer that was kept, with the reason"""


def fold(model: nn.Module, example: Any = None) -> Folding:
    """Return a copy of the model for inference, in which batch normalisation is folded into other layers.

    With an `example`, a batch or a tuple of arguments, the outputs of both models are compared, and parts that cannot
    be traced are seen at work. Pass one if the model does what no graph shows, such as branches on attributes that
    change or weights computed outside of layers.

    All layers that derive from torch.nn's batch normalisation are considered, modules that keep the statistics as
    frozen tensors, and calls of F.batch_norm, on any device. The model itself is not changed. Of a
    DistributedDataParallel the inner module is folded.

    Raises:
        ValueError: the outputs for the example differ by more than 1e-3 of their standard deviation and than rounding
            explains: four times what rounding changes in the outputs of the model itself.
    """
    network, refused = unwrap_model(model), dict[str, str]()
    arguments = example if isinstance(example, tuple) or example is None else (example,)
    while True:
        folding = _fold(network, arguments, refused)
        if arguments is None:
            return folding
        others = check_outputs(network, folding.model, arguments, Folded, fold)
        if not others:
            return folding
        for name, dims in others.items():  # fold again, without them
            layers = ", ".join(folding.folded[name])
            refused[name] = f"its input has {dims} dimensions, in which its channels are not those of {layers}"


@dataclass
class _Plan:
    """A normalisation and the layers that take its scale and shift."""

    name: str
    module: nn.Module  # the norm, or the module whose forward calls F.batch_norm
    layers: list[nn.Module]
    affine: Affine
    dims: int  # of the values that it normalises
    left: Callable[[], Operations] | None = None  # what the module's own forward does, where it is more than that
    after: bool = False  # whether the layer follows it


def _fold(network: nn.Module, example: tuple[Any, ...] | None, refused: dict[str, str]) -> Folding:
    copied = copy_module(network).eval()
    regions, untraced = trace_regions(copied)
    whole = any(region.module is copied for region in regions)
    recorded = None if example is None or whole else record(copied, run, example)
    names = {module: name for name, module in copied.named_modules()}
    plans: list[_Plan] = []
    folded: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    candidates: list[tuple[str, Callable[[], _Plan]]] = [
        (name, partial(_plan_layer, name, norm, regions, untraced, recorded))
        for name, norm in copied.named_modules()
        if is_norm(norm)
    ]
    candidates += [candidate for region in regions for candidate in _functions(region)]
    for name, make_plan in candidates:
        try:
            if name in refused:
                raise CannotFold(refused[name])
            plans.append(make_plan())
        except CannotFold as reason:
            kept[name] = str(reason)
    for plan in plans:  # only now, with the plan complete, do layers change
        try:
            (fold_into_next if plan.after else fold_into)(plan.layers, plan.affine, names)
        except CannotFold as reason:
            kept[plan.name] = str(reason)
            continue
        folded[plan.name] = tuple(names[layer] for layer in plan.layers)
        new: nn.Module = Folded(plan.name, folded[plan.name], plan.dims)
        if plan.left is not None:
            new = without(plan.module, plan.left(), new)
        _become(plan.module, new)
    return Folding(copied, folded, kept)


def _become(module: nn.Module, new: nn.Module) -> None:
    """Change a module into another, because the model may refer to it under several names or in a plain list."""
    if not isinstance(new, Folded):
        new._modules = module._modules | new._modules
    hooks, left_out = {}, {"process_group"}  # of which there can be no copy
    if not is_norm(module):  # the owner of a function, whose parameters and buffers other parts may read
        new._parameters, new._buffers = module._parameters | new._parameters, module._buffers | new._buffers
        hooks = {key: value for key, value in vars(module).items() if key.endswith("_hooks")}
        left_out = set()
    kept = {k: v for k, v in vars(module).items() if k not in vars(new).keys() | left_out and k[0] != "_"}
    module.__class__, module.__dict__ = type(new.eval()), vars(new) | kept | hooks


# Which layers a batch normalisation can be folded into.


def _plan_layer(
    name: str, norm: nn.Module, regions: list[Region], untraced: dict[nn.Module, str], recorded: Region | None
) -> _Plan:
    _check_norm(norm)
    try:
        region = next((region for region in regions if norm in set(region.module.modules())), None)
        if region is None:
            raise CannotFold(untraced[norm], unseen=True)
        if norm in region.shared:
            reason = f"it is also used outside of {region.name}, in a part that cannot be traced"
            raise CannotFold(reason, unseen=True)
        return _plan_calls(name, norm, region)
    except CannotFold as reason:
        if recorded is None or not reason.unseen:
            raise
        calls = [node for node in recorded.nodes() if recorded.called(node) is norm]
        if not calls:
            raise CannotFold("inference never reaches it") from None
        plan = _plan_calls(name, norm, recorded)
        if plan.after:
            raise
    for layer in [norm, *plan.layers]:  # the parts that could be traced show what other inputs do
        for region in regions:
            for node in region.nodes():
                read = [user for user in readers(node) if user.op != "output"]
                if region.called(node) is layer and (input_of(node).op != "placeholder" if layer is norm else read):
                    raise CannotFold(f"{region.name} may use {region.describe(node)} otherwise, for other inputs")
    return plan


def _plan_calls(name: str, norm: nn.Module, region: Region) -> _Plan:
    calls = [node for node in region.nodes() if region.called(node) is norm]
    if not calls:
        raise CannotFold("inference never reaches it")
    if region.reads(calls[0]):
        raise CannotFold("its parameters or statistics are also used elsewhere")
    plain = norm if isinstance(norm, _BatchNorm) and is_plain(norm) else None
    if plain is None and any(len(call.args) != 1 or call.kwargs for call in calls):
        raise CannotFold(f"{type(norm).__name__} overrides forward, and is called with other arguments than its input")
    try:
        layers, dims = _layers_before(calls, region)
    except CannotFold as before:
        if plain is None or any(len(call.args) + len(call.kwargs) != 1 for call in calls):
            raise
        try:
            layer, dims = _layer_after(calls, region)
        except CannotFold:
            raise before from None
        return _Plan(name, norm, [layer], affine_of(plain), dims, after=True)
    if plain is not None:
        if nn.Linear in map(type, layers) and dims == 2 and isinstance(norm, (nn.BatchNorm2d, nn.BatchNorm3d)):
            raise CannotFold("it is for images, in which the features of a linear layer are not the channels")
        return _Plan(name, norm, layers, affine_of(plain), dims)
    found = operations(norm, dims, widths(layers))
    return _Plan(name, norm, layers, found.affine, dims, left=lambda: found)


def _functions(region: Region) -> list[tuple[str, Callable[[], _Plan]]]:
    """Return the calls of F.batch_norm in the region, and how each may be folded."""
    found: list[tuple[str, Callable[[], _Plan]]] = []
    owned: dict[str, list[list[fx.Node]]] = {}  # of each module that calls it: the calls in each graph
    for i, graph in enumerate(region.graphs):
        for node in graph.nodes:
            if node.target in BATCH_NORM:
                stack = list((node.meta.get("nn_module_stack") or {}).values())
                path = str(stack[-1][0]) if stack else ""
                owned.setdefault(path, [[] for _ in region.graphs])[i].append(node)

    def plan(name: str, path: str, which: int) -> _Plan:
        module, in_graphs = region.module.get_submodule(path), owned[path]
        try:
            calls = [node for node in own_graphs(module)[0].nodes if node.target in BATCH_NORM]
        except Exception:  # of any type: it ran the model's own code on proxies
            raise CannotFold("it is in a forward that branches on its input") from None
        if module in region.shared or any(len(nodes) != len(calls) for nodes in in_graphs):
            raise CannotFold("it is called several times, or not for every input")
        layers, dims = _layers_before([nodes[which] for nodes in in_graphs], region)
        of_call = partial(operations, module, dims, widths(layers), which)
        return _Plan(name, module, layers, of_call().affine, dims, left=of_call)

    for path, in_graphs in owned.items():  # from the last on, so that those before it keep their numbers
        most = max(in_graphs, key=lambda nodes: len(nodes))  # noqa: PLW0108  # mypy does not take len for a key
        for which, node in reversed(list(enumerate(most))):
            name = f"F.batch_norm ({node.name} in {region.name})"
            found.append((name, partial(plan, name, path, which)))
    return found


def _layers_before(calls: list[fx.Node], region: Region) -> tuple[list[nn.Module], int]:
    """Return the layers whose outputs the calls normalise, in the order of their channels, and the dimensions."""
    found = [sources(input_of(call), region) for call in calls]
    layers = [[region.called(node) for node in one.calls] for one in found]
    if any(others != layers[0] for others in layers) or len({one[1:] for one in found}) > 1:
        raise CannotFold("it is called after different layers")
    nodes = {node for one in found for node in one.calls}
    for node, layer in zip(found[0].calls, layers[0], strict=True):
        if layers[0].count(layer) > 1 or any(region.called(n) is layer and n not in nodes for n in region.nodes()):
            raise CannotFold(f"{region.describe(node)} before it is also called elsewhere")
        if layer is not None and not scales_with_parameters(layer):
            raise CannotFold(f"{region.describe(node)} before it overrides forward")
    return [layer for layer in layers[0] if layer is not None], found[0].dims or 2


def _layer_after(calls: list[fx.Node], region: Region) -> tuple[nn.Module, int]:
    """Return the layer that follows each of the calls, and the dimensions of its input."""
    nodes = [layer_after(call, region) for call in calls]
    layer = region.called(nodes[0])
    elsewhere = any(region.called(node) is layer and node not in nodes for node in region.nodes())
    if layer is None or elsewhere or not has_plain_forward(layer) or any(region.called(n) is not layer for n in nodes):
        raise CannotFold("the layer after it is also called elsewhere")
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return layer, weight.ndim  # 2 of a linear layer


def _check_norm(norm: nn.Module) -> None:
    if isinstance(norm, _BatchNorm):
        kept = norm.running_mean is not None and norm.running_var is not None
        if isinstance(norm, BatchNorm):
            if norm.statistics == "population" and not int(norm.num_batches_tracked or 0):
                raise CannotFold("it has no population statistics for its present weights")
            if norm.example_weight:
                raise CannotFold("it mixes each example's own statistics into those it keeps (example_weight)")
            kept = kept and norm.num_batches_tracked is not None and norm.statistics != "batch"
        if norm.training or not kept:
            raise CannotFold("it normalises by the batch's own statistics")
    if is_parametrized(norm):
        raise CannotFold("its parameters are parametrised")
    if hooked(norm):
        raise CannotFold("a hook is registered on it")
    if type(norm).__call__ not in (nn.Module.__call__, BatchNorm.__call__):
        raise CannotFold(f"{type(norm).__name__} overrides __call__")
