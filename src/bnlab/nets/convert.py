"""Convert weights from other programs to networks of bnlab.

A file of weights says neither which network it is nor what that network expects. The network follows from the names and
shapes of the tensors; what it expects, from who publishes such names (see `convert_formats.py`).

A bias before batch normalisation is merged into it: BN(conv(x) + b) subtracts E[conv(x) + b] = E[conv(x)] + b, so

    running_mean <- running_mean - b

gives the same outputs without it (Ioffe & Szegedy 2015, sec. 3.2).
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from bnlab.errors import ClassifierError, UsageError, printable
from bnlab.nets import registry
from bnlab.nets.build import build
from bnlab.nets.convert_formats import CAFFE, FORMATS, Format, NamedTensors, guess_format, networks_in, rename
from bnlab.nets.network import TableNetwork
from bnlab.nets.options import check_name
from bnlab.nets.weights import PACKED_REMEDY, check_plain, not_floats, shape_text

Shape = tuple[int, ...]

_COUNTER = ".num_batches_tracked"
_HEADS = ("aux1.", "aux2.")
_BIAS = re.compile(r"(.+)\.(?:conv|linear)(?:\.1)?\.bias")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The network that a file's tensors were converted to."""

    network: TableNetwork
    """In evaluation mode on the CPU; where there are mismatches, the nearest network, without weights."""
    format: Format
    tensors: int  # How many of the file's tensors are used.
    dropped: tuple[str, ...]  # The file's names of tensors that inference does not need.
    merged: int  # How many biases were merged into batch normalisation.
    last_layer: str  # The file's name of the last layer's weight, which has one row for each class.
    prefix: str  # What most of the network's names in the file begin with, and bnlab's do not.
    others: tuple[str, ...]  # The file's names of tensors that lie outside of the network.
    mismatches: tuple[str, ...]  # One line for each tensor that is missing, unknown or of another shape.


def convert(
    tensors: Mapping[str, Tensor],
    *,
    file: str,
    format: str | None = None,
    network: str | None = None,
    prefix: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Find the network that tensors are of, and load them into it.

    Args:
        tensors: by their names in the file.
        file: its name for messages.
        format: a name in FORMATS (default: guessed from names and shapes).
        network: a name in NETWORKS (default: the nearest).
        prefix: what the names of the network's tensors begin with (default: found from the name of the last layer).
        options: known arguments of `build`; they override what the format implies.

    Raises:
        UsageError: no format or network has that name, no tensor's name begins with the prefix, or the network cannot
            be built with these options.
        ClassifierError: the file holds several networks of the same number of tensors; a tensor is not a plain array
            of finite numbers, or has a negative variance.
    """
    given = dict(options or {})
    if format is not None:
        check_name("format", format, FORMATS)
    named = rename(tensors, _prefix(tensors, file) if prefix is None else _checked_prefix(prefix, tensors, file))
    for name, tensor in named.tensors.items():
        check_plain(named.own_name(name), tensor, file)
        _check_complete(named.own_name(name), tensor, file)
    dropped = [name for name in named.tensors if name.startswith(_HEADS)]
    needed = {name: tensor for name, tensor in named.tensors.items() if name not in dropped}
    counters = {name: needed.pop(name) for name in list(needed) if name.endswith(_COUNTER)}
    shapes = {name: _shape(name, tensor) for name, tensor in needed.items()}
    keep_biases = given.get("conv_bias", False) or given.get("placement") == "after"
    biases = {} if keep_biases else _redundant_biases(shapes)
    shapes = {name: shape for name, shape in shapes.items() if name not in biases}
    classes = max(1, next(iter(shapes.get("fc.weight", ())), 1))
    nearest = _nearest(shapes, classes, network, given)
    if format is not None:
        kind = FORMATS[format]
    else:
        kind = CAFFE if named.caffe else guess_format(nearest, merged=len(biases))
    with torch.device("meta"):
        made = build(classes=classes, **{**kind.network, **nearest})
    mismatches = tuple(_mismatches(shapes, _expected(classes, **nearest), named))
    if not mismatches:
        values = {name: _values(needed[name], shape, named.own_name(name), file) for name, shape in shapes.items()}
        for bias, mean in biases.items():
            values[mean] -= _values(needed[bias], shapes[mean], named.own_name(bias), file)
        if named.caffe:
            values["conv1.conv.weight"] = values["conv1.conv.weight"].flip(1)  # BGR to RGB
        values |= {name: _batch_count(counters.get(name)) for name in made.state_dict() if name.endswith(_COUNTER)}
        made.load_state_dict(values, assign=True)
    return Conversion(
        network=made.eval(),
        format=kind,
        tensors=len(named.tensors) - len(dropped),
        dropped=tuple(named.own_name(name) for name in dropped),
        merged=len(biases),
        last_layer=named.own_name("fc.weight"),
        prefix=named.prefix,
        others=named.others,
        mismatches=mismatches,
    )


def _prefix(tensors: Mapping[str, Tensor], file: str) -> str:
    """The prefix of the largest network in the file; it must be the only one of its size."""
    networks = networks_in(tensors)
    largest = [prefix for prefix in networks if len(networks[prefix]) == len(next(iter(networks.values())))]
    if len(largest) > 1:
        names = ", ".join(f"'{printable(prefix)}'" for prefix in largest)
        raise ClassifierError(
            f"{file} holds {len(largest)} networks, whose names begin with {names}", "pass one of them as prefix"
        )
    return largest[0] if largest else ""


def _checked_prefix(prefix: str, tensors: Mapping[str, Tensor], file: str) -> str:
    if not any(name.startswith(prefix) for name in tensors):
        first = printable(next(iter(tensors), ""))
        raise UsageError(f"no name in {file} begins with '{printable(prefix)}'", f"its first name is {first}")
    return prefix


def _check_complete(name: str, tensor: Tensor, file: str) -> None:
    # A stride of 0 lets a few bytes claim any shape.
    if 0 in tensor.shape or tensor.untyped_storage().nbytes() < prod(tensor.shape) * tensor.element_size():
        raise ClassifierError(f"{file} has {printable(name)} without the numbers of its shape", PACKED_REMEDY)


def _shape(name: str, tensor: Tensor) -> Shape:
    """The tensor's shape; old files have the tensors of batch normalisation as 1 x C."""
    shape = tuple(tensor.shape)
    return shape[1:] if ".bn." in name and len(shape) == 2 and shape[0] == 1 else shape


def _redundant_biases(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Biases that a normalisation follows -> the running mean that each is merged into."""
    means = {name: f"{match[1]}.bn.running_mean" for name in shapes if (match := _BIAS.fullmatch(name))}
    return {bias: mean for bias, mean in means.items() if shapes.get(mean) == shapes[bias]}


def _nearest(
    shapes: Mapping[str, Shape], classes: int, network: str | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `build` with the most tensors in common, then the most names, then the fewest other tensors."""

    def rank(options: Mapping[str, Any]) -> tuple[int, int, int]:
        expected = _expected(classes, **options)
        equal = sum(shapes.get(name) == shape for name, shape in expected.items())
        return equal, len(expected.keys() & shapes.keys()), -len(expected)

    normalised = given["norm"] != "none" if given.get("norm") else any(".bn." in name for name in shapes)
    alike = [name for name, spec in registry.NETWORKS.items() if (spec.norm != "none") == normalised]
    ranked, errors = [], []
    for name in [network] if network else alike:
        for variant in (given["variant"],) if given.get("variant") else registry.find(name).variants:
            options = {**given, "name": name, "variant": variant}
            try:
                ranked.append((rank({"stem": None, **options}), options))
            except UsageError as error:  # the options may not suit every network
                errors.append(error)
    if not ranked:
        raise errors[0]
    _, options = max(ranked, key=lambda pair: pair[0])
    # A stem changes the first layer only, so it does not decide which network is nearest.
    return max(({"stem": stem, **options} for stem in (None, *registry.find(options["name"]).stems)), key=rank)


@lru_cache(maxsize=256)
def _expected(classes: int, **options: Any) -> Mapping[str, Shape]:
    """The shapes of the tensors of a network with these arguments of `build`."""
    with torch.device("meta"):
        state = build(classes=classes, **options).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(_COUNTER)}


def _mismatches(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], named: NamedTensors) -> Iterator[str]:
    for name in [*expected, *(name for name in shapes if name not in expected)]:
        own = printable(named.own_name(name))
        if name not in shapes:
            yield f"{own} is missing"
        elif name not in expected:
            yield f"{own} is unknown"
        elif shapes[name] != expected[name]:
            yield f"{own} is {shape_text(shapes[name])}, not {shape_text(expected[name])}"


def _values(tensor: Tensor, shape: Shape, name: str, file: str) -> Tensor:
    """A float32 copy of that shape; shared memory could not be saved."""
    if not tensor.is_floating_point():
        raise not_floats(name, tensor, file)
    values = tensor.detach().to(torch.float32, copy=True).reshape(shape)
    if not bool(values.isfinite().all()):
        raise ClassifierError(
            f"{file} has NaN or infinite numbers in {printable(name)}",
            "its training diverged: use a file from before that",
        )
    if name.endswith("running_var") and bool((values < 0).any()):
        raise ClassifierError(f"{file} has a negative variance in {printable(name)}", "it is broken: save it again")
    return values


def _batch_count(counter: Tensor | None) -> Tensor:
    """How many batches the statistics are of; old files have statistics without counters, which count as 1."""
    known = counter is not None and counter.dtype in (torch.int64, torch.int32) and counter.numel() == 1
    return torch.tensor(max(1, int(counter)) if counter is not None and known else 1)
