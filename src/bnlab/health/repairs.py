"""The repairs: each is a small object with a name, a safety grade and a function that changes a copy of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnlab import norm
from bnlab.errors import UsageError
from bnlab.health.batches import Batch, Batches
from bnlab.health.gather.layers import describe, find_layers, with_trace
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.gather.trace import trace
from bnlab.health.restore import restored
from bnlab.norm.model_utils import without_wrappers
from bnlab.norm.moments import merge_statistics
from bnlab.norm.recalibrate import Recalibration, evaluation_mode

_TRACED = 4  # images that are run to see how layers are used
_BUFFERS = (("running_mean", "running_var"), ("running_mean", "running_covariance"))


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What a repair did."""

    layers: tuple[str, ...] = ()
    """those that it changed"""
    skipped: Mapping[str, str] = field(default_factory=dict)
    """those that it did not, each with the reason"""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A repair. `apply` takes a copy of the model, which it changes, and the batches to measure statistics on."""

    name: str
    safety: Literal["safe", "unsafe"]
    """safe: it cannot change what was trained; unsafe: it may"""
    apply: Callable[[nn.Module, Batches], Changes]
    exact: bool = False
    """whether outputs remain the same, but for rounding"""
    measures: bool = False
    """whether it measures statistics on the batches"""


def recalibrate(*, layer_by_layer: bool = False) -> Repair:
    """Measure the population statistics anew, as `norm.recalibrate` does; the weights stay as they are."""

    def apply(model: nn.Module, batches: Batches) -> Changes:
        done = _recalibrate(model, batches, layer_by_layer=layer_by_layer)
        return Changes(layers=tuple(done.layers), skipped=done.skipped)

    return Repair(name="recalibrate", safety="safe", apply=apply, measures=True)


def freeze(*, affine: bool = True) -> Repair:
    """Keep the statistics, and with `affine` also gamma and beta, as they are in later training; see `norm.freeze`."""

    def apply(model: nn.Module, _: Batches) -> Changes:
        done = norm.freeze(model, affine=affine)
        return Changes(layers=done.frozen, skipped=done.kept)

    return Repair(name="freeze", safety="unsafe", apply=apply)


def merge_ranks(states: Sequence[Mapping[str, Tensor]], images: Sequence[float] | None = None) -> Repair:
    """Give the model the statistics of several processes together, from the state_dict of each; see `norm.merge_ranks`.

    Parameters stay those of the model. The state_dicts have the model's names, but for what wraps it.
    """

    def apply(model: nn.Module, _: Batches) -> Changes:
        merged = {without_wrappers(name): tensor for name, tensor in norm.merge_ranks(states, images).items()}
        own = model.state_dict(keep_vars=True)
        layers, skipped = [], {}
        for name, layer in _layers_with_statistics(model).items():
            keys = [f"{name}.{key}" if name else key for key in _names_of(layer)]
            theirs = {key: merged.get(without_wrappers(key)) for key in keys}
            missing = [key for key, found in theirs.items() if found is None or found.shape != own[key].shape]
            if missing:
                skipped[name] = f"the state_dicts have no {missing[0]} of its shape"
                continue
            for key, found in theirs.items():
                own[key].copy_(found)
            layers.append(name)
        return Changes(layers=tuple(layers), skipped=skipped)

    return Repair(name="merge_ranks", safety="safe", apply=apply)


def adapt(prior: float = 16) -> Repair:
    """Move the statistics towards those of new images: N/(N + n) old ones and n/(N + n) new ones.

    N is `prior`, how many images of the training the old statistics count for, and n is the number of the new images.
    Variances are merged together with the distance of the means. (Schneider et al. 2020, "Improving robustness against
    common corruptions by covariate shift adaptation", eq. 2, which leaves that distance out.)

    Raises:
        UsageError: `prior` is negative.
    """
    if not 0 <= prior < float("inf"):
        raise UsageError(f"prior={prior}", "pass how many images the old statistics count for, 0 or more")

    def apply(model: nn.Module, batches: Batches) -> Changes:
        layers = _layers_with_statistics(model)
        before = {name: [buffer.clone() for buffer in _statistics_of(layer)] for name, layer in layers.items()}
        done = _recalibrate(model, batches)
        weights = torch.tensor([prior, done.images], dtype=torch.float64)
        for name in done.layers:
            now = _statistics_of(layers[name])
            means, variances = (torch.stack(pair).cpu() for pair in zip(before[name], now, strict=True))
            for buffer, value in zip(now, merge_statistics(means, variances, weights), strict=True):
                buffer.copy_(value)
        return Changes(layers=tuple(done.layers), skipped=done.skipped)

    return Repair(name="adapt", safety="unsafe", apply=apply, measures=True)


def set_momentum(momentum: float | None) -> Repair:
    """Set the momentum in torch's sense, the weight of a new batch; None: the average of all batches so far.

    Raises:
        UsageError: it is not in 0..1.
    """
    if momentum is not None and not 0 <= momentum <= 1:
        raise UsageError(f"momentum={momentum}", "pass the weight of a new batch, 0 to 1")
    return _set("momentum", momentum)


def set_eps(eps: float) -> Repair:
    """Set the eps that is added to the variance.

    Raises:
        UsageError: it is not a positive number.
    """
    if not 0 < eps < float("inf"):
        raise UsageError(f"eps={eps}", "pass a positive number, such as 1e-5")
    return _set("eps", eps)


def drop_bias() -> Repair:
    """Set the bias of a convolution or linear layer that feeds normalisation alone to 0, and shift the running mean.

    Outputs stay the same, since the layer subtracts the mean. The bias remains a parameter, so that the weights fit
    the network's code.
    """

    def apply(model: nn.Module, batches: Batches) -> Changes:
        layers = find_layers(model)
        sample = batches.sample(_TRACED)
        with restored(model), evaluation_mode(model):
            StatisticsSwitch(layers).to("running")  # also where they are marked as outdated
            seen = trace(model, layers, lambda: batches.call(model, sample))
        try:
            used = {name: with_trace(describe(name, layer), seen, model) for name, layer in layers.items()}
        finally:
            seen.restore()
        shared = _shared_parameters(model)
        changed, skipped = [], {}
        for name, layer in layers.items():
            found = used[name]
            if found.before is None or found.before_bias is None:
                continue
            bias = model.get_submodule(found.before)._parameters.get("bias")
            if found.before_shared:
                skipped[name] = f"something else reads the output of {found.before}, too"
            elif found.calls != 1:
                skipped[name] = "a forward calls it more than once"
            elif bias is None or id(bias) in shared:
                skipped[name] = f"the bias of {found.before} is shared, or computed from something else"
            elif bool((bias != 0).any()):
                mean = layer._buffers.get("running_mean")
                if mean is not None:
                    mean.copy_(mean.double() - bias.double().to(mean.device))
                bias.zero_()
                changed.append(name)
        return Changes(layers=tuple(changed), skipped=skipped)

    return Repair(name="drop_bias", safety="safe", apply=apply, exact=True)


def _set(attribute: str, value: float | None) -> Repair:
    def apply(model: nn.Module, _: Batches) -> Changes:
        found = {name: layer for name, layer in find_layers(model).items() if hasattr(layer, attribute)}
        others = {name: layer for name, layer in found.items() if getattr(layer, attribute) != value}
        for layer in others.values():
            setattr(layer, attribute, value)
        return Changes(layers=tuple(others))

    return Repair(name=f"set_{attribute}", safety="unsafe", apply=apply)


class _Pairs:
    """Batches as `norm.recalibrate` takes them: the images, and the whole batch."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Batch]]:
        return ((batch.images, batch) for batch in self.batches)


def _recalibrate(model: nn.Module, batches: Batches, *, layer_by_layer: bool = False) -> Recalibration:
    def forward(network: nn.Module, pair: Any) -> object:
        return batches.call(network, pair[1])

    return norm.recalibrate(model, _Pairs(batches), layer_by_layer=layer_by_layer, forward=forward)


def _names_of(layer: nn.Module) -> tuple[str, str]:
    """The names of the layer's mean and variance, or covariance."""
    return _BUFFERS[0] if layer._buffers.get("running_var") is not None else _BUFFERS[1]


def _statistics_of(layer: nn.Module) -> list[Tensor]:
    """The buffers of those names."""
    return [buffer for key in _names_of(layer) if (buffer := layer._buffers.get(key)) is not None]


def _layers_with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    return {name: layer for name, layer in find_layers(model).items() if len(_statistics_of(layer)) == 2}


def _shared_parameters(model: nn.Module) -> set[int]:
    """The ids of parameters that several modules hold."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if id(parameter) in seen:
                shared.add(id(parameter))
            seen.add(id(parameter))
    return shared
