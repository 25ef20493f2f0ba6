"""What is diagnosed: the model, its layers, its batches, and what else the caller gave."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.health.batches import Batch, Batches
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
