"""The models that norm's functions are given, and what of them can be worked on."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model itself, or what a DistributedDataParallel, a DataParallel or torch.compile wraps.

    Raises:
        TypeError: it is no module.
        ValueError: it has no tensors yet, or they hold no values, or it is scripted, and shows no layers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the model comes first, an nn.Module, not {type(model).__name__}")
    network = model
    while isinstance(network, nn.parallel.DistributedDataParallel | nn.DataParallel) or hasattr(network, "_orig_mod"):
        inner = network._orig_mod if hasattr(network, "_orig_mod") else network.module
        assert isinstance(inner, nn.Module)
        network = inner
    if isinstance(network, torch.jit.ScriptModule):
        raise ValueError("a scripted model does not show its layers: give the model that it was made of")
    tensors = [*network.parameters(), *network.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise ValueError("the model has lazy layers without tensors yet: run it once on a batch")
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model is on the meta device, where tensors hold no values: move it and load its weights")
    return network


def hooked(module: nn.Module) -> bool:
    """Whether something watches its calls."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)
