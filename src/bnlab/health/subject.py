"""What is diagnosed: the model, its layers, its batches, and what else the caller gave."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bnlab.errors import BnlabError
from bnlab.health.batches import Batch, Batches
from bnlab.health.evidence import PARTS
from bnlab.norm.sync import SyncBatchNorm
from bnlab.progress import NullProgress, Progress

TrainStep = Callable[[nn.Module, Any], object]
Validate = Callable[[nn.Module], object]


@dataclass(kw_only=True)
class Given:
    """What the caller gave beside the model and the batches; see `diagnose`."""

    optimizer: torch.optim.Optimizer | None = None
    averaged: nn.Module | None = None
    checkpoint: Mapping[str, Tensor] | None = None
    """as `gather.checkpoint.read_checkpoint` reads it"""
    train_step: TrainStep | None = None
    validate: Validate | None = None
    reference: Batches | None = None
    augmented: Batches | None = None
    sources: Callable[[Any], Any] | None = None
    padding: Callable[[Any], Any] | None = None
    ranks: Sequence[Mapping[str, Any]] | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    backends: Sequence[str] = ("channels_last", "bfloat16")


@dataclass(kw_only=True)
class Subject:
    """The model that is diagnosed.

    `model` is what the caller passed and `network` what it wraps. `gather/` measures the network within `restored`.
    """

    model: nn.Module
    network: nn.Module
    layers: Mapping[str, nn.Module]
    batches: Batches
    given: Given
    device: torch.device
    modes: Mapping[str, bool]
    """the mode of each module, by name, in which the caller passed it"""
    parts: Set[str] = frozenset(PARTS)
    """the parts of the evidence that the chosen checks read"""
    usual: int = 0
    """the size of the first batch"""
    notes: list[str] = field(default_factory=list)
    progress: Progress = field(default_factory=NullProgress)

    @property
    def passed(self) -> nn.Module:
        """What the caller's own functions get: the model as it was passed, but not compiled, since hooks do not reach
        the layers of compiled code.
        """
        return self.network if any(hasattr(m, "_orig_mod") for m in self.model.modules()) else self.model

    def call(self, batch: Batch, model: nn.Module | None = None) -> Any:
        """The output of the network, or of another model, for a batch."""
        return self.batches.call(self.network if model is None else model, batch)

    def noting(self, what: str) -> "Noting":
        """A context that notes what could not be done, instead of raising what the caller's code or torch raises."""
        return Noting(self.notes, what)

    @property
    def waits_for_others(self) -> bool:
        """Whether a forward in training mode waits for other processes, which may make no diagnosis."""
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        return several and any(isinstance(m, nn.SyncBatchNorm | SyncBatchNorm) for m in self.layers.values())


@dataclass(frozen=True)
class Noting:
    """Within this context, an error becomes a note. bnlab's own errors, which are about what the caller gave, pass."""

    notes: list[str]
    what: str

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if not isinstance(error, Exception) or isinstance(error, BnlabError):
            return False
        text = (str(error).strip().splitlines() or [""])[0][:200]
        self.notes.append(f"{self.what} ({type(error).__name__}{f': {text}' if text else ''})")
        return True
