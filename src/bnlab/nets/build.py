"""From a name and options to a network."""

import math
from functools import partial
from typing import Any, get_args

import torch

from bnlab.errors import UsageError, printable
from bnlab.nets import blocks, initialise, options, registry, tables
from bnlab.nets.network import TableNetwork
from bnlab.nets.options import MakeNorm
from bnlab.norm.norm_activation import Placement


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
    """A new network, its weights following from `seed` alone; torch's own generator is left as it was.

    >>> network = build("bn_inception", classes=1000, variant="corrected", norm="ghost:16")

    Args:
        name: one of `NETWORKS`.
        classes: how many there are.
        variant: of the table, where it can be read in more ways than one; the first unless given.
        norm: "none", "batch", "sync", "ghost:SIZE" or "whitening:SIZE" (see `options.py`), or a function from a number
            of channels to a layer of your own; the network's own unless given.
        norm_eps: added to the variance.
        norm_momentum: weight of the new batch in the running statistics; None: their plain average.
        activation: "relu", "leaky_relu", "elu", "gelu", "silu", "sigmoid", "tanh" or "none"; the network's own unless
            given.
        placement: normalise "before" or "after" the activation.
        conv_bias: keep the biases that normalisation makes redundant.
        width: every layer so many times as wide.
        stem: "separable" (the paper's first layer) or "small" (for 32 px pictures); the table's own unless given.
        local_response: with GoogLeNet's local response normalisation.
        dropout: share of the features before the last layer that training drops; the network's own unless given.
        auxiliary: with GoogLeNet's two auxiliary classifiers.
        initialisation: "he", "xavier" or "gaussian:STD"; the one that suits the activation unless given.
        in_channels: of the images.
        seed: of the weights.

    Raises:
        UsageError: there is no such network, an argument is out of range, or this network has no use for it.
    """
    for key, word in (("name", name), ("variant", variant), ("activation", activation), ("stem", stem)):
        _check_type(key, word, str, "give a name")
    for key, number in (
        ("width", width),
        ("dropout", dropout),
        ("norm_eps", norm_eps),
        ("norm_momentum", norm_momentum),
    ):
        _check_type(key, number, (int, float), "give a number")
    for key, number in (("classes", classes), ("in_channels", in_channels), ("seed", seed)):
        _check_type(key, number, int, "give a whole number of at least 1")
    network = registry.find(name)
    variant = network.default_variant if variant is None else variant
    norm = network.norm if norm is None else norm
    activation = network.activation if activation is None else activation
    dropout = network.dropout if dropout is None else dropout
    _check_numbers(classes=classes, in_channels=in_channels, dropout=dropout, eps=norm_eps, momentum=norm_momentum)
    table = registry.table_of(name, variant=variant, stem=stem, width=width)
    norms = (norm, norm) if callable(norm) else options.choose_norm(norm, eps=norm_eps, momentum=norm_momentum)
    _check_use(name, norms is not None, placement, auxiliary=auxiliary, local_response=local_response)
    fill = initialise.choose(initialisation, activation)
    settled: dict[str, Any] = {
        "activation": options.choose_activation(activation),
        "placement": placement,
        "bias": conv_bias or norms is None or placement == "after",
    }
    for_maps, for_units = norms or (None, None)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which turns every GPU's back too
        made = TableNetwork(
            table,
            in_channels=in_channels,
            classes=classes,
            convolution=partial(blocks.convolution, norm=for_maps, **settled),
            dense=partial(blocks.dense, norm=for_units, **settled),
            dropout=dropout,
            local_response=local_response,
            auxiliary=auxiliary,
        )
        torch.default_generator.manual_seed(seed)  # again: twins with and without biases begin with the same weights
        initialise.initialise(made, fill)
    made.name = name
    made.arguments = {
        "variant": variant,
        "norm": norm if isinstance(norm, str) else None,
        "norm_eps": norm_eps,
        "norm_momentum": norm_momentum,
        "activation": activation,
        "placement": placement,
        "conv_bias": conv_bias,
        "width": width,
        "stem": stem,
        "local_response": local_response,
        "dropout": dropout,
        "in_channels": in_channels,
    }
    return made


def move_network(network: TableNetwork, device: str) -> TableNetwork:
    """The network on a device, its filters with channels last in memory, as its images are."""
    return network.to(torch.device(device)).to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _check_type(key: str, value: object, kind: type | tuple[type, ...], remedy: str) -> None:
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise UsageError(f"{key} {printable(repr(value))} cannot be", remedy)


def _check_numbers(*, classes: int, in_channels: int, dropout: float, eps: float, momentum: float | None) -> None:
    for key, number in (("classes", classes), ("in_channels", in_channels)):
        if number < 1:
            raise UsageError(f"{key} {printable(repr(number))} cannot be", "give a whole number of at least 1")
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout {dropout} cannot be", "it is a share, at least 0 and below 1")
    if not 0 < eps < math.inf:
        raise UsageError(f"norm_eps {eps} cannot be", "it is a small number above 0")
    if momentum is not None and not 0 <= momentum <= 1:
        raise UsageError(f"norm_momentum {momentum} cannot be", "it is the new batch's weight, 0 to 1")


def _check_use(name: str, normalised: bool, placement: str, *, auxiliary: bool, local_response: bool) -> None:
    """Refuse what would change nothing."""
    if auxiliary and not registry.has_row(name, tables.Auxiliary):
        raise UsageError(f"{name} has no auxiliary classifiers", "leave auxiliary out")
    if local_response and not registry.has_row(name, tables.LocalResponse):
        raise UsageError(f"{name} has no place for local response normalisation", "leave local_response out")
    if placement not in get_args(Placement):
        raise UsageError(f"placement '{printable(str(placement))}' cannot be", "say before or after")
    if placement == "after" and not normalised:
        raise UsageError(f"{name} has no normalisation to place after the activation", "leave placement out")
