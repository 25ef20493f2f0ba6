"""Loads what the caller saves into a copy whose statistics are fresh, as another process would, and compares.

Statistics that do not come back are known exactly: the copy's are NaN before the weights are loaded.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.health.evidence import Evidence, Floats
from bnlab.health.gather.parity import IMAGES, difference, outputs
from bnlab.health.subject import Subject
from bnlab.nets.weights import read_weights
from bnlab.norm.model_utils import WRAPPERS, copy_module, without_wrappers
from bnlab.norm.recalibrate import evaluation_mode

STATISTICS = ("running_mean", "running_var", "running_covariance")
_DEEPEST = 2  # levels of a mapping that are searched for tensors


@dataclass(frozen=True, kw_only=True)
class SavedEvidence:
    """What a state_dict holds, and what the network does once it is loaded. Layers are those that keep statistics."""

    tensors: int
    fitting: int
    """tensors that have the name and the shape of one of the network's, apart from a prefix"""
    missing: tuple[str, ...] = ()
    """layers whose statistics do not come back"""
    not_persistent: tuple[str, ...] = ()
    """those of them whose buffers are registered as not persistent"""
    differing: tuple[str, ...] = ()
    """layers whose statistics come back with other values"""
    other_weights: int = 0
    """parameters that come back with other values"""
    missing_parameters: int = 0
    """parameters that the state_dict lacks"""
    prefix: str = ""
    """what its names begin with and the network's do not"""
    renamed: tuple[str, ...] = ()
    """layers whose statistics it has by another name, so that strict=False drops them"""
    has_statistics: bool = True
    """whether it has statistics of any layer, by whichever name"""
    difference: float | None = None
    """of the outputs, once it is loaded, in standard deviations; None: nothing is amiss, or not measured"""
    scores: Floats | None = None
    """of each image, once it is loaded with strict=False into a network with fresh statistics"""


def read_checkpoint(given: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file or of a state_dict, which may lie within a checkpoint. Nothing in a file is executed.

    Raises:
        ClassifierError: the file cannot be read, or holds anything but weights.
        UsageError: the mapping holds no tensor.
    """
    if not isinstance(given, Mapping):
        return read_weights(Path(given))[0]
    tensors = _most_tensors(given)
    if not tensors:
        raise UsageError("checkpoint holds no tensor", "pass a state_dict, or the file of one")
    return tensors


def _most_tensors(given: Mapping[str, Any], depth: int = 0) -> dict[str, Tensor]:
    own = {str(key): value for key, value in given.items() if isinstance(value, Tensor)}
    inner = [
        _most_tensors(value, depth + 1)
        for key, value in given.items()
        if isinstance(value, Mapping) and depth < _DEEPEST and "optim" not in str(key)
    ]
    return max([own, *inner], key=len)


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Inspect the state_dict of the network itself, and the checkpoint if there is one."""
    network, layers = subject.network, subject.layers
    if isinstance(network, torch.jit.ScriptModule):
        return {}
    parts: dict[str, Any] = {}
    with subject.noting("saving and loading could not be tried"):  # hooks of the caller may run
        own = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
        names = {f"{layer}.{key}" for layer, key in _statistics(layers)}
        whole = names <= own.keys()
        parts["state_dict"] = (
            SavedEvidence(tensors=len(own), fitting=len(own)) if whole else inspect(subject, own, evidence)
        )
        if subject.given.checkpoint is not None:
            parts["checkpoint"] = inspect(subject, subject.given.checkpoint, evidence)
    return parts


def inspect(subject: Subject, given: Mapping[str, Tensor], evidence: Evidence) -> SavedEvidence:
    """Load tensors into a copy of the network, and compare it with the network."""
    network, layers = subject.network, subject.layers
    own = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    sources, prefix = _match({key: tuple(value.shape) for key, value in own.items()}, given)
    has_statistics = any(name.rpartition(".")[2] in STATISTICS for name in given)
    if not sources and has_statistics:  # it is of another network
        return SavedEvidence(tensors=len(given), fitting=0)
    with evaluation_mode(network), torch.no_grad():
        copied = copy_module(network)
        inner = dict(copied.named_modules())
        for name, key in _statistics(layers):
            _buffer(inner[name], key).fill_(float("nan"))
        names = sources if sources else {key: key for key in given if key in own}
        copied.load_state_dict({key: given[source] for key, source in names.items()}, strict=False)
        missing: dict[str, None] = {}
        differing: dict[str, None] = {}
        for name, key in _statistics(layers):
            found, expected = _buffer(inner[name], key), _buffer(layers[name], key)
            if bool(found.isnan().any()):
                if not bool(expected.isnan().any()):
                    missing[name] = None
            elif not _same(found, expected, given.get(names.get(f"{name}.{key}", ""))):
                differing[name] = None
        other = sum(
            not _same(dict(copied.named_parameters())[key], p, given[names[key]])
            for key, p in network.named_parameters()
            if key in names
        )
        renamed = {
            name: None
            for name, key in _statistics(layers)
            if names.get(f"{name}.{key}", f"{name}.{key}") != f"{name}.{key}"
        }
        if not _drops(prefix, given):
            prefix, renamed = "", {}
        fresh = missing | renamed
        for name in fresh:
            _make_fresh(inner[name])
        off, scores = None, None
        if fresh or (differing and not other):
            batch = subject.batches.sample(IMAGES)
            off = difference(outputs(subject, batch, copied), outputs(subject, batch, network))
            scores = _scores(subject, copied) if evidence.scores is not None else None
    return SavedEvidence(
        tensors=len(given),
        fitting=len(names),
        missing=tuple(missing),
        not_persistent=tuple(name for name in missing if layers[name]._non_persistent_buffers_set & {*STATISTICS}),
        differing=tuple(differing),
        other_weights=other,
        missing_parameters=sum(key not in names for key, _ in network.named_parameters() if key in own),
        prefix=prefix,
        renamed=tuple(renamed),
        has_statistics=has_statistics,
        difference=off,
        scores=scores,
    )


def _statistics(layers: Mapping[str, nn.Module]) -> list[tuple[str, str]]:
    """The layers' names with the names of those of their buffers that hold statistics."""
    return [(name, key) for name, layer in layers.items() for key in STATISTICS if layer._buffers.get(key) is not None]


def _buffer(layer: nn.Module, key: str) -> Tensor:
    found = layer._buffers[key]
    assert found is not None
    return found


def _same(found: Tensor, expected: Tensor, source: Tensor | None) -> bool:
    """Whether two tensors are equal, as exactly as the type in which one was saved can tell."""
    kind = found.dtype if source is None or not source.is_floating_point() else source.dtype
    return torch.equal(found.to(kind), expected.to(found.device).to(kind))


def _match(own: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor]) -> tuple[dict[str, str], str]:
    """The network's names -> the given names of the same shape, without the prefix that fits most, and that prefix."""
    plain = {without_wrappers(key): key for key in own}
    if len(plain) < len(own):  # the network has parts that are called like a wrapper
        plain = {key: key for key in own}
    prefixes: Counter[str] = Counter()
    found: dict[str, dict[str, str]] = {}
    for source, tensor in given.items():
        parts = source.split(".")
        for start in range(len(parts)):
            rest = ".".join(parts[start:])
            key = rest if rest in own else plain.get(without_wrappers(rest))
            if key is None or own[key] != tuple(tensor.shape):
                continue
            before = ".".join(p for p in parts[:start] if p not in WRAPPERS)
            prefixes[before] += 1
            found.setdefault(before, {}).setdefault(key, source)
            break
    if not prefixes:
        return {}, ""
    best = max(prefixes, key=lambda name: (prefixes[name], -len(name)))
    removed = [source.removesuffix(key) for key, source in found[best].items() if source.endswith(key)]
    return found[best], max(set(removed), key=removed.count) if removed else best


def _drops(prefix: str, given: Mapping[str, Tensor]) -> bool:
    """Whether load_state_dict would not find the names: they do not just lie beside other tensors, as in a set."""
    return not prefix or all(name.startswith(prefix) for name in given)


def _make_fresh(layer: nn.Module) -> None:
    for key, buffer in layer._buffers.items():
        if buffer is None or key not in (*STATISTICS, "num_batches_tracked"):
            continue
        if key == "running_covariance":
            buffer.copy_(torch.eye(buffer.shape[-1]).to(buffer).expand_as(buffer))
        else:
            buffer.fill_(1 if key == "running_var" else 0)


@torch.no_grad()
def _scores(subject: Subject, model: nn.Module) -> Floats | None:
    found = []
    for batch in subject.batches:
        score = subject.batches.score(subject.batches.call(model, batch), batch)
        if score is None:
            return None
        found.append(score)
    return torch.cat(found).numpy()
