"""What a normalising layer normalises by, and when: running, population or batch statistics; frozen or not."""

from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from bnlab.norm.naming import name_of

Statistics = Literal["running", "population", "batch"]


class TooFewValuesError(ValueError):
    """A training batch has one value for each channel, or none, so that it has no variance to normalise by."""


class StatisticsMode(nn.Module):
    """Base of the layers that keep statistics: buffers `running_...` and `num_batches_tracked`, None where not tracked.

    `statistics` is what inference normalises by. "running": the moving average that training left, as in torch.nn.
    "population": what `recalibrate` measured with the weights fixed (Alg. 2); training leaves it alone, but marks it as
    outdated (`num_batches_tracked` 0), and inference by outdated statistics is refused. "batch": the batch's own.
    """

    num_features: int
    track_running_stats: bool
    num_batches_tracked: Tensor | None
    _statistics: Statistics = "running"
    frozen: bool = False
    _mode: bool = True  # what the last train() or eval() asked for
    _stopped: tuple[str, ...] = ()  # the parameters that freeze() stopped

    @property
    def statistics(self) -> Statistics:
        """What inference normalises by."""
        return self._statistics

    @statistics.setter
    def statistics(self, which: Statistics) -> None:
        if which not in get_args(Statistics):
            raise ValueError(f"statistics is one of {', '.join(get_args(Statistics))}, not {which!r}")
        if which == "population" and not self.track_running_stats:
            raise ValueError("population statistics need a layer with track_running_stats=True to hold them")
        self._statistics = which

    def freeze(self, *, affine: bool = True) -> Self:
        """Normalise by the stored statistics from now on, in training too, and leave them alone.

        Unlike `eval()` it survives a later `train()`. With `affine` gamma and beta are no longer trained either
        (until a later `requires_grad_(True)` on the model).

        Raises:
            ValueError: the layer keeps no statistics to freeze.
        """
        if not self.track_running_stats or getattr(self, "running_mean", None) is None:
            raise ValueError(f"{name_of(self)} cannot be frozen: it keeps no running statistics")
        if affine:
            for name, parameter in self.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self._stopped = (*self._stopped, name)
                    parameter.requires_grad_(False)
        if not self.frozen:
            self._mode, self.frozen = self.training, True
        return self.train(self._mode)

    def unfreeze(self) -> Self:
        """Undo `freeze`: the layer is in the mode it would be in without it, and trains what it trained before."""
        for name in self._stopped:
            getattr(self, name).requires_grad_(True)
        self._stopped, self.frozen = (), False
        return self.train(self._mode)

    def train(self, mode: bool = True) -> Self:
        """As torch.nn's; a frozen layer stays in evaluation."""
        self._mode = mode
        return super().train(mode and not self.frozen)

    def _moves(self) -> bool:
        """Whether this forward normalises by the batch and moves what is stored."""
        return self.training and not self.frozen

    def _by_stored(self) -> bool:
        """Whether this forward normalises by what is stored.

        Raises:
            ValueError: it should, by population statistics, and they are not those of the present weights.
        """
        if self._moves() or self._statistics == "batch":
            return False
        if self._statistics == "population" and not torch.compiler.is_compiling() and not self._measured():
            raise ValueError(
                f"{name_of(self)} has no population statistics for its present weights: "
                "norm.recalibrate(model, batches) measures them"
            )
        return True

    def _measured(self) -> bool:
        return self.num_batches_tracked is not None and bool(self.num_batches_tracked)

    def _count(self, moved: bool | Tensor) -> None:
        """A training batch has passed; `moved` is whether it moved the running statistics."""
        batches = self.num_batches_tracked
        if batches is None:
            return
        if self._statistics == "population":  # measured for weights that are about to change
            batches.zero_()
        else:
            batches.add_(1 if moved is True else moved)

    def _check_size(self, input: Tensor) -> None:
        """Refuse a batch that has no statistics.

        Raises:
            TooFewValuesError: it is empty, or has one value a channel.
        """
        values = input.numel() // self.num_features
        if values == 0:
            raise TooFewValuesError(
                f"{name_of(self)} got an empty batch, {list(input.shape)}: "
                "statistics need values; leave the batch out, or call eval() for inference"
            )
        if values == 1:
            raise TooFewValuesError(  # the message begins as torch's own
                f"Expected more than 1 value per channel when training, got input size {input.size()} "
                f"at {name_of(self)}: use batches of two or more, larger images, or freeze() the layer; "
                "for inference call eval()"
            )
