"""Batch normalisation layers: torch.nn's, to the same state_dict and the same bits, with what those lack.

    y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta            (Ioffe & Szegedy 2015, arXiv 1502.03167, sec. 3)

E and Var are each channel's, over all examples and positions (sec. 3.2).

Training: those of the batch, Var biased (divided by m). The running statistics move towards the batch's by `momentum`,
the weight of the new batch (torch's sense: Keras' 0.99 is 0.01 here), with Var unbiased (m - 1); with `momentum=None`
they are the plain average of all batches so far. A batch whose statistics are not finite does not move them.
Inference: as `statistics` says (see `modes.py`).

Shapes: N examples, C = num_features channels, then any number of positions.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import kernels, weighing
from bnlab.norm.kernels import Running
from bnlab.norm.modes import Statistics, StatisticsMode
from bnlab.norm.naming import name_of
from bnlab.norm.save_memory import batch_norm_relu


class BatchNorm(StatisticsMode, _BatchNorm):
    """What the layers of every number of dimensions share.

    Parameters beyond torch.nn's: `statistics` (see `modes.py`); `example_weight`, 0 to 1: how much of each example's
    own statistics inference mixes into those (see `weighing.py`).

    Raises:
        TooFewValuesError: a training batch is empty or has a single value for each channel.
        ValueError: inference lacks population statistics; the input has the wrong number of dimensions; eps is 0 or
            less. Messages name the layer.
        RuntimeError: an input with another number of channels.
    """

    example_weight: float = 0.0

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        statistics: Statistics = "running",
        example_weight: float = 0.0,
        **more: Any,  # `bias`, where torch has it
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **more)
        if not 0 <= example_weight <= 1:
            raise ValueError(f"example_weight is a share, 0 to 1, not {example_weight}")
        self.statistics = statistics
        self.example_weight = example_weight

    def forward(self, input: Tensor, *, relu: bool = False) -> Tensor:
        """The normalised batch, N x C x ... as it came.

        With `relu` it is rectified too, and backward needs one tensor of that size instead of two (see `memory.py`).
        """
        self._check_shape(input)
        if self._moves():
            y, moved = self._by_batch(input, self._running(), relu=relu)
            self._count(moved)
            return y
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or not self._by_stored():
            return self._by_batch(input, None, relu=relu)[0]
        if self.eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {self.eps} at {name_of(self)}")
        if self.example_weight:
            y = weighing.normalise(input, mean, var, self.weight, self.bias, self.eps, self.example_weight)
        else:
            y = kernels.by_statistics(input, mean, var, self.weight, self.bias, self.eps)  # N x C x ...
        return F.relu(y, inplace=True) if relu else y

    def _check_shape(self, input: Tensor) -> None:
        try:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        except ValueError as error:
            if type(error) is not ValueError:  # a tracer's own
                raise
            raise ValueError(f"{error} at {name_of(self)}") from None
        if input.size(1) != self.num_features:
            raise RuntimeError(  # torch's class of error for it
                f"{name_of(self)} is for {self.num_features} channels, and got {input.shape[1]}: {list(input.shape)}"
            )

    def extra_repr(self) -> str:
        """torch.nn's, and what is not as there."""
        more = [f"statistics={self.statistics!r}"] * (self.statistics != "running")
        more += [f"example_weight={self.example_weight}"] * bool(self.example_weight)
        return ", ".join([super().extra_repr(), *more, *["frozen"] * self.frozen])  # type: ignore[no-untyped-call]

    def _by_batch(self, input: Tensor, running: Running | None, *, relu: bool) -> tuple[Tensor, bool | Tensor]:
        if input.numel() < 2 * self.num_features:
            self._check_size(input)
        if self.eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {self.eps} at {name_of(self)}")
        return self._transform(input, running, relu=relu)

    def _transform(self, input: Tensor, running: Running | None, *, relu: bool) -> tuple[Tensor, bool | Tensor]:
        """Normalise by the batch and move the running statistics: what other kinds of layer do their own way."""
        if relu:
            return batch_norm_relu(input, self.weight, self.bias, running, self.eps)
        done = kernels.by_batch(input, self.weight, self.bias, running, self.eps)
        return done.y, done.moved

    def _running(self) -> Running | None:
        """What a training batch moves; nothing where population statistics stand."""
        mean, var, momentum = self.running_mean, self.running_var, self.momentum
        if mean is None or var is None or not self.track_running_stats or self._statistics == "population":
            return None
        if momentum is None:
            momentum = 0.0 if self.num_batches_tracked is None else 1 / (1 + int(self.num_batches_tracked))
        return Running(mean, var, momentum)


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Over N x C, or N x C x L."""


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Over N x C x H x W."""


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Over N x C x D x H x W."""


def is_plain(layer: _BatchNorm) -> bool:
    """Whether its forward is batch normalisation and nothing else: a subclass may have added an activation, say."""
    known = (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)
    return type(layer).forward in known and "forward" not in vars(layer)


def batch_norm_layers(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Every batch normalisation layer of a model once, torch.nn's and bnlab's, under its first name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name, module
