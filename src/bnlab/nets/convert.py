"""Weights from elsewhere as a network of the catalogue.

A file of weights says neither which network it is nor what that network sees. The names and the shapes of its tensors
tell the network; who publishes such names, what it was trained to see.

Biases before batch normalisation are merged into it: BN(conv(x) + b) subtracts E[conv(x) + b] = E[conv(x)] + b, so

    running_mean <- running_mean - b

gives the same outputs without them (Ioffe & Szegedy 2015, sec. 3.2).
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.errors import ClassifierError, UsageError, did_you_mean, printable
from bnlab.nets import registry
from bnlab.nets.build import build
from bnlab.nets.convert_formats import CAFFE, FORMATS, Format, guess
from bnlab.nets.convert_names import Named, rename
from bnlab.nets.network import TableNetwork

Shape = tuple[int, ...]

_NOT_FLOATS = "not as floating-point numbers"
_PLAIN = "save the weights before they are quantised or packed"
_COUNTER = ".num_batches_tracked"
_HEADS = ("aux1.", "aux2.")
_BIAS = re.compile(r"(.+)\.(?:conv|linear)(?:\.1)?\.bias")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What the tensors of a file came to."""

    network: TableNetwork
    """in evaluation mode on the CPU; the nearest one, without weights, where there are mismatches"""
    format: Format
    tensors: int
    """how many of the file's are used"""
    dropped: tuple[str, ...]
    """the file's names of tensors that inference does not need"""
    merged: int
    """biases that went into batch normalisation"""
    last_layer: str
    """the file's name of the last layer's weight, which has one row a class"""
    mismatches: tuple[str, ...]
    """a line for each tensor that is missing, unknown or of another shape"""


class _Candidate(NamedTuple):
    network: str
    options: tuple[tuple[str, Any], ...]
    """arguments of `build`"""

    def given(self, **options: Any) -> "_Candidate":
        """With other options."""
        return _Candidate(self.network, tuple(sorted({**dict(self.options), **options}.items())))


def convert(
    tensors: Mapping[str, Tensor],
    *,
    file: str,
    format: str | None = None,
    network: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Conversion:
    """Find the network the tensors are of, and give it their values.

    Args:
        tensors: by the names they have in the file.
        file: what messages call it.
        format: a name in FORMATS, where it is known; else it is guessed from the names and the shapes.
        network: of the catalogue, where it is known; else the nearest is looked for.
        options: arguments of `build`, where they are known; they win over what the format has.

    Raises:
        UsageError: there is no such format or network, or it cannot be built so.
        ClassifierError: a tensor holds no plain, finite numbers, or a negative variance.
    """
    given = dict(options or {})
    if format is not None and format not in FORMATS:
        raise UsageError(f"no format is called '{printable(format)}'", did_you_mean(format, list(FORMATS)))
    for name, tensor in tensors.items():
        _check_plain(name, tensor, file)
    named = rename(tensors)
    dropped = [name for name in named.tensors if name.startswith(_HEADS)]
    needed = {name: tensor for name, tensor in named.tensors.items() if name not in dropped}
    counters = {name: needed.pop(name) for name in list(needed) if name.endswith(_COUNTER)}
    shapes = {name: _shape(name, tensor) for name, tensor in needed.items()}
    kept = given.get("conv_bias", False) or given.get("placement") == "after"
    biases = {} if kept else _redundant_biases(shapes)
    shapes = {name: shape for name, shape in shapes.items() if name not in biases}
    rows = _rows(shapes)
    best = _nearest(shapes, rows, network, given)
    kind = (
        FORMATS[format]
        if format
        else CAFFE
        if named.caffe
        else guess(best.network, dict(best.options), merged=len(biases))
    )
    with torch.device("meta"):
        made = build(best.network, classes=rows, **(dict(kind.network) | dict(best.options)))
    mismatches = tuple(_mismatches(shapes, _expected(best, rows), named))
    if not mismatches:
        values = {name: _values(needed[name], shape, named.own_name(name), file) for name, shape in shapes.items()}
        for bias, mean in biases.items():
            values[mean] -= _values(needed[bias], shapes[mean], named.own_name(bias), file)
        if named.caffe:
            values["conv1.conv.weight"] = values["conv1.conv.weight"].flip(1)  # BGR to RGB
        for name in made.state_dict():
            if name.endswith(_COUNTER):
                values[name] = _counted(counters.get(name))
        made.load_state_dict(values, assign=True)
    return Conversion(
        network=made.eval(),
        format=kind,
        tensors=len(named.tensors) - len(dropped),
        dropped=tuple(named.own_name(name) for name in dropped),
        merged=len(biases),
        last_layer=named.own_name("fc.weight"),
        mismatches=mismatches,
    )


def _check_plain(name: str, tensor: Tensor, file: str) -> None:
    """Refuse what is more, or less, than an array of numbers that are all in the file.

    A few bytes can claim any shape by a stride of 0.
    """
    plain = not tensor.is_nested and tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain:
        raise ClassifierError(f"{file} has {printable(name)} as {_kind(tensor)}, {_NOT_FLOATS}", _PLAIN)
    if 0 in tensor.shape or tensor.untyped_storage().nbytes() < prod(tensor.shape) * tensor.element_size():
        raise ClassifierError(f"{file} has {printable(name)} without the numbers of its shape", _PLAIN)


def _shape(name: str, tensor: Tensor) -> Shape:
    """Of the tensor; old files keep those of batch normalisation as 1 x C."""
    shape = tuple(tensor.shape)
    return shape[1:] if ".bn." in name and len(shape) == 2 and shape[0] == 1 else shape


def _redundant_biases(shapes: Mapping[str, Shape]) -> dict[str, str]:
    """Biases with a normalisation behind them, and the running mean that takes each."""
    found = {}
    for name, shape in shapes.items():
        match = _BIAS.fullmatch(name)
        mean = f"{match[1]}.bn.running_mean" if match else ""
        if shapes.get(mean) == shape:
            found[name] = mean
    return found


def _rows(shapes: Mapping[str, Shape]) -> int:
    """How many classes the last layer tells apart."""
    return max(1, next(iter(shapes.get("fc.weight", ())), 1))


def _nearest(shapes: Mapping[str, Shape], rows: int, network: str | None, given: Mapping[str, Any]) -> _Candidate:
    """The candidate with the most tensors in common, then with the most names, then with the fewest others."""

    def rank(candidate: _Candidate) -> tuple[int, int, int]:
        expected = _expected(candidate, rows)
        alike = sum(shapes.get(name) == shape for name, shape in expected.items())
        return alike, len(expected.keys() & shapes.keys()), -len(expected)

    names = (network,) if network else _of_kind(given.get("norm"), shapes)
    best = max(_candidates(names, given), key=rank)
    if "stem" in given:
        return best
    stems = (best.given(stem=stem) for stem in registry.find(best.network).stems)  # they change the first layer alone
    return max([best, *stems], key=rank)


def _of_kind(norm: str | None, shapes: Mapping[str, Shape]) -> list[str]:
    """The networks that are normalised by themselves, or those that are not, as was told or as the tensors are."""
    normalised = any(".bn." in name for name in shapes) if norm is None else norm != "none"
    return [name for name, entry in registry.CATALOGUE.items() if (entry.norm != "none") == normalised]


def _candidates(names: Sequence[str], given: Mapping[str, Any]) -> list[_Candidate]:
    found, errors = [], []
    for name in names:
        entry = registry.find(name)
        for variant in (given["variant"],) if given.get("variant") else entry.variants:
            candidate = _Candidate(name, ()).given(**{"stem": None, **given, "variant": variant})
            try:
                _shapes_of(candidate)
                found.append(candidate)
            except UsageError as error:  # what was told may not suit every network
                errors.append(error)
    if not found:
        raise errors[0]
    return found


@lru_cache(maxsize=256)
def _shapes_of(candidate: _Candidate) -> Mapping[str, Shape]:
    with torch.device("meta"):  # shapes alone: nothing is allocated or filled
        network = build(candidate.network, classes=1, **dict(candidate.options))
    return {name: tuple(t.shape) for name, t in network.state_dict().items() if not name.endswith(_COUNTER)}


def _expected(candidate: _Candidate, rows: int) -> dict[str, Shape]:
    shapes = _shapes_of(candidate)
    return {**shapes, "fc.weight": (rows, *shapes["fc.weight"][1:]), "fc.bias": (rows,)}


def _mismatches(shapes: Mapping[str, Shape], expected: Mapping[str, Shape], named: Named) -> Iterator[str]:
    for name in [*expected, *(name for name in shapes if name not in expected)]:
        own = printable(named.own_name(name))
        if name not in shapes:
            yield f"{own} is missing"
        elif name not in expected:
            yield f"{own} is unknown"
        elif shapes[name] != expected[name]:
            yield f"{own} is {_shown(shapes[name])}, not {_shown(expected[name])}"


def _shown(shape: Shape) -> str:
    return " x ".join(map(str, shape)) if shape else "one number"


def _values(tensor: Tensor, shape: Shape, name: str, file: str) -> Tensor:
    """A copy as float32, and of that shape."""
    if not tensor.is_floating_point():
        raise ClassifierError(f"{file} has {printable(name)} as {_kind(tensor)}, {_NOT_FLOATS}", _PLAIN)
    values = tensor.detach().to(torch.float32, copy=True).reshape(shape)  # shared memory could not be saved
    if not bool(values.isfinite().all()):
        raise ClassifierError(
            f"{file} has NaN or infinite numbers in {printable(name)}", "its training diverged: give an earlier file"
        )
    if name.endswith("running_var") and bool((values < 0).any()):
        raise ClassifierError(f"{file} has a negative variance in {printable(name)}", "it is broken: save it again")
    return values


def _kind(tensor: Tensor) -> str:
    layout = "" if tensor.layout == torch.strided else f"{tensor.layout} of ".removeprefix("torch.")
    return layout + str(tensor.dtype).removeprefix("torch.") + (" without values" if tensor.is_meta else "")


def _counted(counter: Tensor | None) -> Tensor:
    """How many batches the statistics are of; files from before there were counters have statistics all the same."""
    known = counter is not None and counter.dtype in (torch.int64, torch.int32) and counter.numel() == 1
    return torch.tensor(max(1, int(counter.item())) if counter is not None and known else 1)
