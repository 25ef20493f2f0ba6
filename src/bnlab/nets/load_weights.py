"""Load a file of weights into any network, strictly: only the statistics of normalisation layers may differ."""

from collections import defaultdict
from collections.abc import Container, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from bnlab.errors import ClassifierError, UsageError, plural, printable
from bnlab.nets.factory import check_tensors
from bnlab.nets.weights import PACKED_REMEDY, check_plain, not_floats, read_weights, shape_text
from bnlab.norm.model_utils import WRAPPERS, without_wrappers

STATISTICS = ("running_mean", "running_var", "running_covariance", "num_batches_tracked")
"""The names of the buffers of a normalisation layer."""
_MOST_NAMED = 3  # tensors of each kind of mismatch
_LONGEST = 200  # characters of another program's message


@dataclass(frozen=True, kw_only=True)
class WeightsLoaded:
    """What was loaded, and what differed between the file and the network."""

    tensors: int  # How many of the file's tensors were loaded.
    prefix: str  # What the file's names begin with and the network's do not, such as "module." or "state_dict_ema.".
    missing_statistics: tuple[str, ...]
    """The network's names of statistics that the file lacks: these keep the values that they had."""
    extra_statistics: tuple[str, ...]
    """The file's names of statistics that the network does not keep; they were not loaded."""
    other_dtypes: Mapping[str, str]
    """The file's dtype by the network's name of the tensor, such as "float16", where it is not the network's."""
    others: tuple[str, ...]
    """The file's names of tensors outside of the prefix, such as those of a loss or of an optimiser's average."""


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """The tensors of a file with one prefix, by the network's names."""

    tensors: Mapping[str, Tensor]
    own: Mapping[str, str]  # the network's name -> the file's name
    fitting: int  # how many have the name and the shape of one of the network's


def load_weights(model: nn.Module, path: Path, *, prefix: str | None = None) -> WeightsLoaded:
    """Load a file of weights into the model, as `load_state_dict` does. Nothing in the file is executed.

    The file is safetensors, or a state_dict that torch.save wrote, alone or within a checkpoint, whatever its keys
    are. Of the file's names, a prefix is removed where the rest are the model's, and so are the parts that
    DataParallel, torch.compile and other wrappers of torch add. Every parameter and buffer of the model must be there
    with its shape, and there must be no other, but for statistics of normalisation layers (`STATISTICS`) and for
    tensors outside of the prefix: these are returned. Of the names of a shared parameter, one suffices. Values are
    converted to the model's dtype.

    Args:
        path: the file.
        prefix: what the names of the tensors to load begin with (default: the one with which they fit).

    Raises:
        ClassifierError: the file cannot be read, holds more than weights, holds several sets of weights that fit, or
            does not fit the model. The model is unchanged.
        UsageError: no tensor's name has this prefix before a name of the model's; the model's tensors do not exist yet.
    """
    tensors, _ = read_weights(path)
    file, kind = printable(path), type(model).__name__
    check_tensors(model, f"the {kind}")
    expected = {name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
    aliases = _aliases(expected)
    fits = _fits(tensors, expected)
    chosen = _choose(fits, prefix, expected, aliases, file)
    fit = fits.get(chosen, _Fit(tensors=tensors, own={name: name for name in tensors}, fitting=0))
    layers = {layer for layer, _ in model.named_modules()}
    extra = {name for name in fit.tensors if name not in expected and _is_statistic(name, layers)}
    values = {name: tensor for name, tensor in fit.tensors.items() if name not in extra}
    _check_values(values, fit, expected, aliases, file)
    may_lack = {name for name in expected if _covered(name, values, aliases) or _is_statistic(name, layers)}
    shapes = [
        f"{printable(fit.own[name])} is {shape_text(tensor.shape)}, not {shape_text(expected[name].shape)}"
        for name, tensor in values.items()
        if name in expected and not _same_shape(tensor, expected[name])
    ]
    if shapes:
        missing = [name for name in expected if name not in may_lack]
        unexpected = [name for name in values if name not in expected]
    else:
        missing, unexpected = _load(model, values, may_lack, file)
    problems = {
        "is missing": [printable(name) for name in missing],
        "is unexpected": [printable(fit.own.get(name, name)) for name in unexpected],
        "has another shape": shapes,
    }
    if any(problems.values()):
        raise _misfit(problems, file, kind)
    used = set(fit.own.values())
    removed = [own.removesuffix(name) for name, own in fit.own.items() if own.endswith(name)]
    return WeightsLoaded(
        tensors=len(values),
        prefix=max(set(removed), key=removed.count) if removed else chosen,
        missing_statistics=tuple(name for name in expected if name not in values and _is_statistic(name, layers)),
        extra_statistics=tuple(fit.own[name] for name in fit.tensors if name in extra),
        other_dtypes={
            name: str(tensor.dtype).removeprefix("torch.")
            for name, tensor in values.items()
            if name in expected and tensor.dtype != expected[name].dtype
        },
        others=tuple(name for name in tensors if name not in used),
    )


def _aliases(expected: Mapping[str, Tensor]) -> Mapping[str, tuple[str, ...]]:
    """Each name of the model's -> all names of its tensor, which may be shared."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in expected.items():
        names[id(tensor)].append(name)
    return {name: tuple(names[id(tensor)]) for name, tensor in expected.items()}


def _fits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, _Fit]:
    """The tensors under each prefix after which a name of the model's follows."""
    known = {without_wrappers(name): name for name in expected}
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for own in tensors:
        parts = own.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            before = own.removesuffix(rest)
            if rest in expected:
                found[before][rest] = own
            elif parts[start] not in WRAPPERS and (name := known.get(without_wrappers(rest))):
                found[before].setdefault(name, own)
    fits = {}
    for prefix, names in found.items():
        taken = set(names.values())
        others = [own for own in tensors if own.startswith(prefix) and own not in taken]
        own_names = names | {own.removeprefix(prefix): own for own in others}
        fits[prefix] = _Fit(
            tensors={name: tensors[own] for name, own in own_names.items()},
            own=own_names,
            fitting=sum(_same_shape(tensors[own], expected[name]) for name, own in names.items()),
        )
    return fits


def _same_shape(tensor: Tensor, expected: Tensor) -> bool:
    """Whether the shapes are the same; torch 0.3 wrote single numbers with one dimension."""
    return tensor.shape == expected.shape or (expected.ndim == 0 and tensor.shape == (1,))


def _choose(
    fits: Mapping[str, _Fit],
    prefix: str | None,
    expected: Mapping[str, Tensor],
    aliases: Mapping[str, tuple[str, ...]],
    file: str,
) -> str:
    """The prefix to load: the given one, the only one with which all of the model is there, or the nearest."""
    if prefix is not None:
        if prefix in fits:
            return prefix
        near = get_close_matches(prefix, fits, n=1) or list(fits)[:_MOST_NAMED]
        raise UsageError(
            f"after '{printable(prefix)}', no name in {file} is one of the network's",
            f"pass {' or '.join(map(_prefix_text, near))}" if near else "pass the weights of this network",
        )
    complete = [
        name
        for name, fit in fits.items()
        if all(_covered(key, fit.tensors, aliases) or key.rpartition(".")[2] in STATISTICS for key in expected)
    ]
    most = max((fits[name].fitting for name in complete), default=0)
    sets: dict[frozenset[str], str] = {}  # the same tensors may have several prefixes: the shortest counts
    for name in sorted(complete, key=len):
        if fits[name].fitting == most:
            sets.setdefault(frozenset(fits[name].own.values()), name)
    best = list(sets.values())
    if len(best) > 1:
        raise ClassifierError(
            f"{file} holds {len(best)} sets of weights that fit, with {' and '.join(map(_prefix_text, best))}",
            "choose one as prefix",
        )
    return best[0] if best else max(fits, key=lambda name: (fits[name].fitting, -len(name)), default="")


def _prefix_text(prefix: str) -> str:
    return f"the prefix '{printable(prefix)}'" if prefix else "no prefix"


def _covered(name: str, given: Mapping[str, Tensor], aliases: Mapping[str, tuple[str, ...]]) -> bool:
    return any(alias in given for alias in aliases.get(name, (name,)))


def _is_statistic(name: str, layers: Container[str]) -> bool:
    """Whether it is the name of a statistic of one of these layers, which the model has."""
    layer, _, last = name.rpartition(".")
    return last in STATISTICS and layer in layers


def _check_values(
    values: Mapping[str, Tensor],
    fit: _Fit,
    expected: Mapping[str, Tensor],
    aliases: Mapping[str, tuple[str, ...]],
    file: str,
) -> None:
    """Refuse tensors whose values cannot become those of the model, and different values for a shared one."""
    for name, tensor in values.items():
        like, own = expected.get(name), fit.own[name]
        alike = like is not None and (tensor.layout, tensor.is_quantized) == (like.layout, like.is_quantized)
        if not alike or tensor.is_meta:
            check_plain(own, tensor, file)
        if like is None or tensor.dtype == like.dtype:
            continue
        if isinstance(like, nn.Parameter) and like.is_floating_point() and not tensor.is_floating_point():
            raise not_floats(own, tensor, file)
        if tensor.is_complex() != like.is_complex():
            kinds = f"{tensor.dtype}, and the network's is {like.dtype}".replace("torch.", "")
            raise ClassifierError(f"{printable(own)} in {file} is {kinds}", PACKED_REMEDY)
    for names in set(aliases.values()):
        first, *rest = [name for name in names if name in values] or [""]
        for other in rest:
            if values[first].shape == values[other].shape and not torch.equal(values[first], values[other]):
                raise ClassifierError(
                    f"{file} has different values for {printable(first)} and {printable(other)}, which are one "
                    "parameter in the network",
                    "use the weights of a network that shares it, or do not share it",
                )


def _load(
    model: nn.Module, values: Mapping[str, Tensor], may_lack: Container[str], file: str
) -> tuple[list[str], list[str]]:
    """Load the values; return the names that are missing and those that are unexpected. If there are, nothing changes.

    The model decides which they are, because its hooks may rename what an older version of it saved.
    """
    before = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    done = False
    try:
        found = model.load_state_dict(dict(values), strict=False)
        missing = [name for name in found.missing_keys if name not in may_lack]
        done = not missing and not found.unexpected_keys
    except Exception as error:  # of any type, because the model's own code may run
        message = printable(" ".join(str(error).split()))[:_LONGEST]
        raise ClassifierError(
            f"{file} cannot be loaded into {type(model).__name__}, which raises {type(error).__name__} ({message})",
            "pass the weights of this network",
        ) from error
    finally:
        if not done:
            with torch.no_grad():
                for tensor, old in before:
                    tensor.copy_(old)
    return missing, list(found.unexpected_keys)


def _misfit(problems: Mapping[str, list[str]], file: str, kind: str) -> ClassifierError:
    """The one line for tensors that are missing, unexpected or of another shape, by the verb that says so."""
    plurals = {"is missing": "are missing", "is unexpected": "are unexpected", "has another shape": "have other shapes"}
    parts = []
    for verb, names in problems.items():
        if names:
            listed = ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
            parts.append(f"{plural(len(names), 'tensor')} {verb if len(names) == 1 else plurals[verb]} ({listed})")
    return ClassifierError(
        f"{file} does not fit {kind}: {'; '.join(parts)}", "pass the weights of this network, or build that of the file"
    )
