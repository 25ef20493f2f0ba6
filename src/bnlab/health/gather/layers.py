"""Finds the layers that keep statistics, and describes them."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from bnlab.health.evidence import Family, Floats, LayerEvidence
from bnlab.health.gather.trace import Trace
from bnlab.norm.freeze import Freezable, own_class
from bnlab.norm.layers import StatisticsMode
from bnlab.norm.whitening import Whitening

_LINEAR_FORWARDS = {cls.forward for cls in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}  # by the weights as they are
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm)


def find_layers(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that keep running statistics or could, by their first name."""
    return {name: module for name, module in network.named_modules() if family_of(module) is not None}


def family_of(module: nn.Module) -> Family | None:
    """How a module normalises; None if it keeps no statistics, and could not."""
    if isinstance(module, _BatchNorm):
        return "batch"
    if isinstance(module, Whitening):
        return "whitening"
    if isinstance(module, _InstanceNorm):
        return "instance"
    if isinstance(module, torch.jit.ScriptModule):
        return None  # it cannot be switched to other statistics
    mean, variance = module._buffers.get("running_mean"), module._buffers.get("running_var")
    return "frozen" if mean is not None and variance is not None and mean.shape == variance.shape else None


def other_norms(network: nn.Module) -> dict[str, int]:
    """How many normalisation layers of each class keep no statistics."""
    return dict(Counter(type(m).__name__ for m in network.modules() if isinstance(m, _OTHER_NORMS)))


def describe(name: str, module: nn.Module) -> LayerEvidence:
    """What the layer itself shows."""
    family = family_of(module)
    assert family is not None
    mean, variance = module._buffers.get("running_mean"), module._buffers.get("running_var")
    if variance is None and isinstance(module, Whitening) and module.running_covariance is not None:
        variance = module.running_covariance.diagonal(dim1=1, dim2=2).flatten()
    gamma, beta = getattr(module, "weight", None), getattr(module, "bias", None)
    updates = getattr(module, "num_batches_tracked", None)
    channels = getattr(module, "num_features", None) or (0 if mean is None else len(mean))
    return LayerEvidence(
        name=name,
        kind=own_class(module).__name__,
        family=family,
        channels=int(channels),
        eps=float(getattr(module, "eps", 1e-5)),
        momentum=getattr(module, "momentum", None if family == "frozen" else 0.1),
        tracks=bool(getattr(module, "track_running_stats", mean is not None)),
        training=module.training,
        frozen=family == "frozen" or (isinstance(module, Freezable) and module.frozen),
        gamma=_array(gamma),
        beta=_array(beta),
        gamma_trained=isinstance(gamma, nn.Parameter) and gamma.requires_grad,
        beta_trained=isinstance(beta, nn.Parameter) and beta.requires_grad,
        running_mean=_array(mean),
        running_variance=_array(variance),
        updates=int(updates) if isinstance(updates, Tensor) and not updates.is_meta else None,
        outdated=isinstance(module, StatisticsMode) and module.statistics == "population" and not updates,
        dtype="none" if mean is None else str(mean.dtype).removeprefix("torch."),
    )


def _array(tensor: Any) -> Floats | None:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return None
    return tensor.detach().cpu().to(torch.float64, copy=True).numpy()


def with_trace(layer: LayerEvidence, found: Trace, network: nn.Module) -> LayerEvidence:
    """The layer with what the trace shows of it."""
    call = found.used.get(layer.name)
    if call is None:
        return layer
    alone = call.activates or found.reads[layer.name] == 1
    fields: dict[str, Any] = {
        "calls": call.calls,
        "depth": call.depth,
        "inputs": call.inputs,
        "dims": len(call.shape),
        "values_per_image": math.prod(call.shape[2:]) if len(call.shape) > 1 else None,
        "activation": call.activation if alone else None,
        "before": call.before,
    }
    if call.before is not None:
        module = network.get_submodule(call.before)
        fields |= {"before_kind": type(module).__name__, "before_shared": found.reads[call.before] > 1}
        bias = getattr(module, "bias", None)
        if call.same_channels and isinstance(bias, Tensor) and len(bias) == layer.channels:
            fields["before_bias"] = None if call.before in found.dropped else _array(bias)
        weight = getattr(module, "weight", None) if type(module).forward in _LINEAR_FORWARDS else None
        if call.same_channels and isinstance(weight, Tensor) and len(weight) == layer.channels:
            fields["before_weight"] = _array(weight.detach().flatten(1).abs().amax(1))
    return replace(layer, **fields)
