"""What norm needs to know of a model: what a wrapper holds, a layer's name, hooks, classes; what torch.fx sees."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""parts of names that wrappers of torch add: DataParallel, torch.compile, FSDP and checkpoint_wrapper"""


class FxLeaf(nn.Module):
    """A layer that torch.fx records as one call, as it does with torch.nn's layers, instead of tracing its forward."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        proxy = next((arg for arg in (*args, *kwargs.values()) if isinstance(arg, fx.Proxy)), None)
        if proxy is not None and isinstance(tracer := proxy.tracer, fx.Tracer):
            path = tracer.path_of_module(self)
            if not tracer.is_leaf_module(self, path):
                return tracer.create_proxy("call_module", path, args, kwargs)
        return super().__call__(*args, **kwargs)


_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model itself, or what a DistributedDataParallel, a DataParallel or torch.compile wraps.

    Raises:
        TypeError: the argument is not a module.
        ValueError: its tensors do not exist yet, or it is a scripted model, which hides its layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument must be the model, an nn.Module, not {type(model).__name__}")
    network = model
    while isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(network, "_orig_mod"):
        inner = network._orig_mod if hasattr(network, "_orig_mod") else network.module
        assert isinstance(inner, nn.Module)
        network = inner
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError("a scripted model does not show its layers: pass the model that it was made of")
    if any(is_lazy(tensor) for tensor in (*network.parameters(), *network.buffers())):
        raise ValueError("the model has lazy layers without tensors yet: run it once on a batch")
    return network


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return what `unwrap` returns, whose tensors hold values.

    Raises:
        TypeError: the argument is not a module.
        ValueError: its tensors do not exist yet or hold no values, or it is a scripted model, which hides its layers.
    """
    network = unwrap(model)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise ValueError("the model is on the meta device, where tensors hold no values: move it and load its weights")
    return network


def without_wrappers(name: str) -> str:
    """A tensor's name without what DistributedDataParallel, compilation and the like put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def copy_module(module: nn.Module, shared: Iterable[Any] = ()) -> Any:
    """Return a deep copy that has what is `shared` in common with the module, and process groups.

    Of tensors with a history, such as a weight that weight_norm or a pruning computes, it has the values: torch does
    not copy those tensors.
    """
    memo: dict[int, Any] = {id(part): part for part in shared}
    for owner in module.modules():
        for value in (*vars(owner).values(), *owner._buffers.values()):
            if type(value) in (dict, OrderedDict) and not value:  # no hooks, say, whose copies are most of the time
                memo[id(value)] = type(value)()
            elif isinstance(value, dist.ProcessGroup):  # which cannot be copied
                memo[id(value)] = value
            elif isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(module, memo)


def hooked(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on the module, or on all modules."""
    return any(
        (
            *_GLOBAL_HOOKS,
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


class Made(nn.Module):
    """Mixed into classes that `make_class` made, so that their layers can be pickled and copied."""

    made_by: ClassVar[tuple[Any, ...]]  # a function, and the arguments from which it makes the class

    def __reduce_ex__(self, protocol: Any) -> Any:
        state: tuple[Any, ...] = super().__reduce_ex__(protocol)[2:]  # type: ignore[assignment]
        return _new, (recipe_of(type(self)),), *state


_MADE: dict[tuple[Any, ...], type[nn.Module]] = {}


def make_class(name: str, bases: tuple[type, ...], like: type, made_by: tuple[Any, ...]) -> type[nn.Module]:
    """Return the class that `made_by` makes, which seems to come from where the class `like` does; always the same."""
    if made_by not in _MADE:
        names = {"__module__": like.__module__, "__doc__": like.__doc__, "made_by": made_by}
        _MADE[made_by] = type(name, (*bases, Made), names)
    return _MADE[made_by]


def recipe_of(kind: type) -> Any:
    """Return what pickle can store of a class: the class, or how to make it."""
    if "made_by" not in vars(kind):
        return kind
    function, *arguments = vars(kind)["made_by"]
    return function, *(recipe_of(argument) for argument in arguments)


def class_from(recipe: Any) -> type[nn.Module]:
    """Return the class of which `recipe_of` returned the recipe."""
    if isinstance(recipe, type):
        return recipe
    function, *arguments = recipe
    made: type[nn.Module] = function(*(class_from(argument) for argument in arguments))
    return made


def _new(recipe: Any) -> nn.Module:
    kind = class_from(recipe)
    return kind.__new__(kind)


def runs_again() -> bool:
    """Whether backward runs this forward, as torch.utils.checkpoint does to compute again what it did not keep."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def example_inputs(layer: nn.Module) -> Iterator[Tensor]:
    """Yield batches that a normalisation layer may take: 4 x C x 3 x 3, then other numbers of positions."""
    like = next((t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    for positions in ((3, 3), (), (3,), (3, 3, 3)):
        yield torch.randn(4, int(layer.num_features), *positions, generator=generator).to(like)  # type: ignore[arg-type]


def layer_name(layer: nn.Module) -> str:
    """The layer's name in the outermost module that is running it, and its class: `block1.bn (BatchNorm2d)`.

    A module does not know its own name, but its callers, up the stack, do. A layer that is called by itself has its
    class as its name. This is for error messages alone: the search costs nothing until an error is raised.
    """
    name, frame = "", inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            name = next((known for known, module in caller.named_modules() if module is layer), name)
        frame = frame.f_back
    kind = type(layer).__name__
    return f"{name} ({kind})" if name else kind
