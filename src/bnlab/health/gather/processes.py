"""Compares the processes of a distributed training: their running statistics, and how they use synchronised layers.

The processes exchange what they found through the store of torch.distributed. A collective would wait for ever where
one process alone makes a diagnosis; here, a process waits for the others for WAIT only.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnlab.errors import BnlabError, UsageError, plural
from bnlab.health.compare import Comparison
from bnlab.health.evidence import Evidence, Floats, LayerEvidence, distances, is_off
from bnlab.health.gather.statistics_switch import StatisticsSwitch
from bnlab.health.subject import Subject
from bnlab.norm.moments import merge_statistics
from bnlab.norm.recalibrate import evaluation_mode
from bnlab.norm.sync import SyncBatchNorm
from bnlab.norm.whitening import Whitening

WAIT = timedelta(seconds=10)
"""for the other processes' diagnoses"""
_KEY = "bnlab.health"  # in the store
_WRAPPERS = ("module.", "_orig_mod.")
_exchanged: list[None] = []  # one for each time that all processes have told what they found


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The running statistics of R processes."""

    means: Mapping[str, Floats]
    """R x C, by layer"""
    variances: Mapping[str, Floats]
    own: int | None
    """the number of this process; None: the model is not that of a process, and the state_dicts were given"""
    cost: Comparison | None = None
    """the scores by the model's running statistics and by the merged ones; None: not measured, or nothing is off"""

    def merged(self, name: str) -> tuple[Floats, Floats]:
        """Mean and variance of all processes' values together: the variance has that of the means in it; C each."""
        means, variances = torch.from_numpy(self.means[name]), torch.from_numpy(self.variances[name])
        mean, variance = merge_statistics(means, variances, torch.ones(len(means)))
        return mean.numpy(), variance.numpy()


@dataclass(frozen=True, kw_only=True)
class Sync:
    """The layers that normalise by the batches of all processes."""

    layers: tuple[str, ...]
    refuse_cpu: tuple[str, ...]
    """those of torch's class, which refuses tensors of the CPU while several processes train"""
    device: str
    """kind of the model's device, such as cpu"""
    processes: int
    calls: tuple[Mapping[str, int], ...] = ()
    """of each process: how often a forward calls each of the layers; empty: not exchanged"""
    batches: tuple[int, ...] = ()
    """of each process: the number of batches of the diagnosis"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """The parts "sync", if the model has synchronised layers, and "ranks", if several processes' statistics are known.

    Raises:
        UsageError: the caller's state_dicts do not fit the model.
    """
    _note_data_parallel(subject)
    parts: dict[str, Any] = {}
    synchronised = [n for n, m in subject.layers.items() if isinstance(m, nn.SyncBatchNorm | SyncBatchNorm)]
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    layers = [layer for layer in evidence.normalised if layer.usable and _by_moments(subject, layer)]
    everyone = None
    if processes > 1:
        calls = {name: evidence.layers[name].calls for name in synchronised}
        statistics = {layer.name: _stacked(layer) for layer in layers}
        everyone = _exchange(subject, {"statistics": statistics, "calls": calls, "batches": evidence.batches})
    if synchronised:
        parts["sync"] = Sync(
            layers=tuple(synchronised),
            refuse_cpu=tuple(n for n in synchronised if not isinstance(subject.layers[n], SyncBatchNorm)),
            device=subject.device.type,
            processes=processes,
            calls=tuple(found["calls"] for found in everyone or ()),
            batches=tuple(found["batches"] for found in everyone or ()),
        )
    states: list[dict[str, Tensor]] | None = None
    if subject.given.ranks is not None:
        states = _given(subject.given.ranks, layers)
    elif everyone is not None:
        states = [found["statistics"] for found in everyone]
    if states is not None and layers:
        parts["ranks"] = _compare(subject, evidence, states, layers)
    return parts


def _by_moments(subject: Subject, layer: LayerEvidence) -> bool:
    return not layer.frozen and not isinstance(subject.layers[layer.name], Whitening)


def _stacked(layer: LayerEvidence) -> Tensor:
    """Mean and variance, 2 x C."""
    assert layer.running_mean is not None and layer.running_variance is not None
    return torch.from_numpy(np.stack([layer.running_mean, layer.running_variance]))


def _note_data_parallel(subject: Subject) -> None:
    for module in subject.model.modules():
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 and module.training:
            subject.notes.append(
                f"DataParallel trains on {len(module.device_ids)} devices, each of which normalises its own part of a "
                "batch, and keeps the running statistics of the first device alone: those of a smaller batch. "
                "DistributedDataParallel with synchronised layers uses the whole batch"
            )


def _exchange(subject: Subject, found: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """What each process found, by rank; None, with a note, if they did not all tell it."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    keys = [f"{_KEY}/{len(_exchanged)}/{number}" for number in range(processes)]
    buffer = io.BytesIO()
    torch.save(dict(found), buffer)
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(keys[rank], buffer.getvalue())  # type: ignore[arg-type]  # its stub wants str
        try:
            store.wait(keys, WAIT)
        except Exception:
            store.delete_key(keys[rank])  # so that a later diagnosis of the others does not take it for a new one
            raise
        everyone = [torch.load(io.BytesIO(store.get(key)), weights_only=True) for key in keys]
        if store.add(f"{_KEY}/{len(_exchanged)}/read", 1) == processes:
            for key in keys:
                store.delete_key(key)
    except Exception:  # a store raises what its backend does
        subject.notes.append(
            f"the statistics of the {processes} processes were not compared, since not all of them "
            f"made a diagnosis within {WAIT.total_seconds():g} seconds: diagnose in each, or pass ranks="
        )
        return None
    _exchanged.append(None)
    return everyone


def _given(ranks: Sequence[Mapping[str, Any]], layers: Sequence[LayerEvidence]) -> list[dict[str, Tensor]]:
    """The statistics in the state_dicts: 2 x C for each layer."""
    if isinstance(ranks, Mapping) or len(ranks) < 2:
        number = "one state_dict" if isinstance(ranks, Mapping) else plural(len(ranks), "state_dict")
        raise UsageError(f"ranks has {number}", "pass a list with the state_dict of each process, two or more")
    states = []
    for rank, state in enumerate(ranks):
        plain = {_without_wrappers(key): value for key, value in state.items()}
        found = {}
        for layer in layers:
            pair = []
            for key in ("running_mean", "running_var"):
                name = f"{layer.name}.{key}" if layer.name else key
                value = plain.get(name)
                if not isinstance(value, Tensor) or value.shape != (layer.channels,):
                    got = f"of shape {list(value.shape)}" if isinstance(value, Tensor) else "not there"
                    raise UsageError(
                        f"ranks[{rank}]: {name} is {got}, and the model's has {plural(layer.channels, 'value')}",
                        "pass the state_dict() of the same model in each process",
                    )
                pair.append(value.detach().cpu().double())
            found[layer.name] = torch.stack(pair)
        states.append(found)
    return states


def _without_wrappers(key: str) -> str:
    while key.startswith(_WRAPPERS):
        key = key.partition(".")[2]
    return key


def _compare(
    subject: Subject, evidence: Evidence, states: Sequence[Mapping[str, Tensor]], layers: Sequence[LayerEvidence]
) -> Ranks | None:
    kept = [layer for layer in layers if all(layer.name in state for state in states)]
    arrays = {layer.name: torch.stack([s[layer.name] for s in states]).numpy() for layer in kept}  # R x 2 x C
    given = subject.given.ranks is not None
    ranks = Ranks(
        means={name: array[:, 0] for name, array in arrays.items()},
        variances={name: array[:, 1] for name, array in arrays.items()},
        own=None if given else dist.get_rank(),
    )
    off = []
    for layer in kept:
        assert layer.running_mean is not None and layer.running_variance is not None
        far = distances(layer.running_mean, layer.running_variance, *ranks.merged(layer.name), layer.eps)
        off.append(bool(is_off(*far).any()))
    scores = None if evidence.scores is None else evidence.scores.running
    if scores is None or not any(off):
        return ranks
    try:
        merged = _scores_by(subject, {layer.name: ranks.merged(layer.name) for layer in kept})
    except BnlabError:
        raise
    except Exception as error:  # of any type: it is the caller's own code
        subject.notes.append(f"merged statistics were not scored, since {type(error).__name__} was raised: {error}")
        return ranks
    return replace(ranks, cost=subject.batches.compare(scores, merged))


@torch.no_grad()
def _scores_by(subject: Subject, statistics: Mapping[str, tuple[Floats, Floats]]) -> Floats:
    """The scores of all images where the layers normalise by these means and variances."""
    switch = StatisticsSwitch(subject.layers)
    tensors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, (mean, variance) in statistics.items():
        like = switch.buffers[name]["running_mean"]
        assert like is not None
        tensors[name] = torch.from_numpy(mean).to(like), torch.from_numpy(variance).to(like)
    scores = []
    with evaluation_mode(subject.network):
        switch.to("population", tensors)
        for batch in subject.batches:
            score = subject.batches.score(subject.call(batch), batch)
            assert score is not None
            scores.append(score)
    return torch.cat(scores).numpy()
