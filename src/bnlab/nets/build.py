"""`build`: from a name and options to a network."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from bnlab.errors import UsageError, printable
from bnlab.nets import blocks, initialise, options, registry, tables
from bnlab.nets.network import TableNetwork
from bnlab.nets.options import MakeNorm
from bnlab.norm.norm_activation import Placement

# Argument -> its type, the values that are valid (None is, where the type has it), and what to use instead of others.
_COUNT = (int, lambda number: number >= 1, "use a whole number of at least 1")
_CONSTRAINTS: Mapping[str, tuple[Any, Callable[[Any], bool], str]] = {
    "classes": _COUNT,
    "norm_eps": (int | float, lambda eps: 0 < eps < math.inf, "use a small number above 0"),
    "norm_momentum": (int | float | None, lambda m: 0 <= m <= 1, "use the weight of the new batch, 0 to 1"),
    "placement": (str, lambda place: place in ("before", "after"), "use before or after"),
    "width": (int | float, lambda factor: 0 < factor <= 16, "use a factor above 0 and at most 16"),
    "dropout": (int | float | None, lambda p: 0 <= p < 1, "use a fraction of at least 0 and below 1"),
    "in_channels": _COUNT,
    "seed": (int, lambda _: True, "use a whole number"),
}


def build(
    name: str,
    *,
    classes: int,
    variant: str | None = None,
    norm: str | MakeNorm | None = None,
    norm_eps: float = 1e-5,
    norm_momentum: float | None = 0.1,
    activation: str | None = None,
    placement: Placement = "before",
    conv_bias: bool = False,
    width: float = 1.0,
    stem: str | None = None,
    local_response: bool = False,
    dropout: float | None = None,
    auxiliary: bool = False,
    initialisation: str | None = None,
    in_channels: int = 3,
    seed: int = 0,
) -> TableNetwork:
    """Build a new network. Its weights follow from `seed` alone, and torch's own generator is not touched.

    >>> network = build("bn_inception", classes=1000, variant="corrected", norm="ghost:16")

    Args:
        name: one of `NETWORKS`.
        classes: how many outputs the network has.
        variant: which reading of the network's table (default: the first).
        norm: "none", "batch", "sync", "ghost:SIZE" or "whitening:SIZE" (see `options.py`), or a function from a number
            of channels to a layer of your own (default: the network's own).
        norm_eps: added to the variance.
        norm_momentum: weight of the new batch in the running statistics; None: their plain average.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh" or "none" (default: the network's
            own).
        placement: normalise "before" or "after" the activation.
        conv_bias: keep the biases that normalisation makes redundant.
        width: factor by which every layer is wider.
        stem: "separable" (the paper's first layer) or "small" (for 32 px images) (default: the table's own).
        local_response: add GoogLeNet's local response normalisation.
        dropout: fraction of the features before the last layer that training drops (default: the network's own).
        auxiliary: add GoogLeNet's two auxiliary classifiers.
        initialisation: "he", "xavier" or "gaussian:STD" (default: the one that suits the activation).
        in_channels: of the images.
        seed: of the weights.

    Raises:
        UsageError: no network has that name, an argument is not valid, or the argument has no effect on this network.
    """
    arguments = dict(locals())
    _check_arguments(arguments)
    spec = registry.find(name)
    variant = next(iter(spec.variants)) if variant is None else variant
    norm = spec.norm if norm is None else norm
    activation = spec.activation if activation is None else activation
    dropout = spec.dropout if dropout is None else dropout
    options.check_name(f"variant of {name}", variant, spec.variants)
    options.check_name("activation", activation, options.ACTIVATIONS)
    norms = (norm, norm) if callable(norm) else options.choose_norm(norm, eps=norm_eps, momentum=norm_momentum)
    fill = initialise.choose(initialisation, activation)
    if stem is not None and not spec.stems:
        raise UsageError(f"{name} has no stem '{printable(str(stem))}' to replace its table's own", "leave stem out")
    if auxiliary and not registry.has_row(name, tables.Auxiliary):
        raise UsageError(f"{name} has no auxiliary classifiers", "leave auxiliary out")
    if local_response and not registry.has_row(name, tables.LocalResponse):
        raise UsageError(f"{name} has no local response normalisation", "leave local_response out")
    if placement == "after" and norms == (None, None):
        raise UsageError(f"{name} has no normalisation to place after the activation", "leave placement out")
    table = spec.variants[variant]
    if stem is not None:
        options.check_name(f"stem of {name}", stem, spec.stems)
        table = spec.stems[stem](table)
    layer_options: dict[str, Any] = {
        "activation": options.ACTIVATIONS[activation],
        "placement": placement,
        "bias": conv_bias or norms == (None, None) or placement == "after",
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
        network = TableNetwork(
            tables.widen(table, width),
            in_channels=in_channels,
            classes=classes,
            conv=partial(blocks.conv_norm_act, norm=norms[0], **layer_options),
            linear=partial(blocks.linear_norm_act, norm=norms[1], **layer_options),
            dropout=dropout,
            local_response=local_response,
            auxiliary=auxiliary,
        )
        torch.default_generator.manual_seed(seed)  # again, so that weights do not depend on whether there are biases
        initialise.initialise(network, fill)
    network.name = name
    arguments |= {"variant": variant, "activation": activation, "dropout": dropout}
    arguments["norm"] = norm if isinstance(norm, str) else None  # a function is not kept
    network.arguments = {key: arguments[key] for key in (*registry.ARCHITECTURE_KEYS, "dropout", "in_channels")}
    return network


def move_network(network: TableNetwork, device: str) -> TableNetwork:
    """Move a network to a device, with channels last in memory, which is how images are laid out, too."""
    return network.to(torch.device(device)).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for key, (kind, is_valid, remedy) in _CONSTRAINTS.items():
        value = arguments[key]
        right_type = isinstance(value, kind) and not isinstance(value, bool)
        if not right_type or (value is not None and not is_valid(value)):
            raise UsageError(f"{key} {printable(repr(value))} is not valid", remedy)
