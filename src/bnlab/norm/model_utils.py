"""What the functions of norm need to know of a model: the model inside a wrapper, a layer's name, hooks."""

import inspect

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model itself, or what a DistributedDataParallel, a DataParallel or torch.compile wraps.

    Raises:
        TypeError: the argument is not a module.
        ValueError: its tensors do not exist yet or hold no values, or it is a scripted model, which hides its layers.
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
    tensors = [*network.parameters(), *network.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError("the model has lazy layers without tensors yet: run it once on a batch")
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model is on the meta device, where tensors hold no values: move it and load its weights")
    return network


def hooked(module: nn.Module) -> bool:
    """Whether a forward or backward hook is registered on the module."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


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
