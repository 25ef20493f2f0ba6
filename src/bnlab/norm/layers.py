"""Batch normalisation layers: torch.nn's, with the same state_dict and the same bits, and what those lack.

    y = (x - E[x]) / sqrt(Var[x] + eps) * gamma + beta            (Ioffe & Szegedy 2015, arXiv 1502.03167, sec. 3)

E and Var are taken for each channel, over all examples and positions (sec. 3.2).

Training uses E and Var of the batch, Var biased (divided by m). The running statistics move towards those of the batch
by `momentum`, the weight of the new batch (torch's sense: Keras' 0.99 is 0.01 here), with Var unbiased (divided by
m - 1). With `momentum=None` they are the plain average of all batches so far. A batch whose statistics are not finite
does not move them. Inference uses what `statistics` names (see `StatisticsMode`).

Shapes: N examples, C = num_features channels, then any number of positions.
"""

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm import kernels
from bnlab.norm.freeze import Freezable
from bnlab.norm.kernels import Running
from bnlab.norm.model_utils import FxLeaf, layer_name, runs_again
from bnlab.norm.save_memory import batch_norm_relu

Statistics = Literal["running", "population", "batch"]


class TooFewValuesError(ValueError):
    """A training batch has one value for each channel, so that it has no variance to normalise by."""


class StatisticsMode(FxLeaf, Freezable):
    """Base of the layers that keep statistics: it chooses those that a forward normalises by.

    A subclass has buffers `running_...` and `num_batches_tracked`, which are None where statistics are not tracked.

    `statistics` names what inference normalises by:
    - "running": the moving average that training left, as in torch.nn.
    - "population": what `recalibrate` measured with the weights fixed (paper, Alg. 2). Training does not move these
      statistics but marks them as outdated (`num_batches_tracked` is 0), and inference by outdated ones is refused.
    - "batch": the statistics of the batch itself.
    """

    num_features: int
    momentum: float | None
    track_running_stats: bool
    num_batches_tracked: Tensor | None
    _statistics: Statistics = "running"

    @property
    def statistics(self) -> Statistics:
        return self._statistics

    @statistics.setter
    def statistics(self, which: Statistics) -> None:
        if which not in get_args(Statistics):
            raise ValueError(f"statistics must be one of {', '.join(get_args(Statistics))}, not {which!r}")
        if which == "population" and not self.track_running_stats:
            raise ValueError("population statistics need a layer with track_running_stats=True to hold them")
        self._statistics = which

    def _in_training(self) -> bool:
        """Whether this forward normalises by the batch and updates what is stored."""
        return self.training and not self.frozen

    def _uses_stored_statistics(self) -> bool:
        """Whether this forward normalises by the stored statistics; refuse population statistics that are outdated."""
        if self._in_training() or self._statistics == "batch":
            return False
        if self._statistics == "population" and not torch.compiler.is_compiling() and not self.num_batches_tracked:
            raise ValueError(
                f"{layer_name(self)} has no population statistics for its present weights: "
                "measure them with norm.recalibrate(model, batches)"
            )
        return True

    def _updates_running(self) -> bool:
        return self.track_running_stats and self._statistics != "population"

    def _weight_of_new_batch(self) -> float:
        """Return momentum, or for a cumulative average (momentum None) 1 / the number of batches."""
        if self.momentum is not None:
            return self.momentum
        return 0.0 if self.num_batches_tracked is None else 1 / (1 + int(self.num_batches_tracked))

    def _count_batch(self, updated: bool | Tensor) -> None:
        """Count a training batch, if it updated the running statistics."""
        batches = self.num_batches_tracked
        if batches is None:
            return
        if self._statistics == "population":  # measured for weights that are about to change
            batches.zero_()
        else:
            batches.add_(1 if updated is True else updated)

    def _check_batch_size(self, input: Tensor) -> None:
        """Refuse a batch that has no variance, because it has one value for each channel."""
        if input.numel() == self.num_features:
            raise TooFewValuesError(  # the message begins as torch's own
                f"Expected more than 1 value per channel when training, got input size {input.size()} "
                f"at {layer_name(self)}: use batches of two or more, larger images, or freeze() the layer; "
                "for inference call eval()"
            )


class BatchNorm(StatisticsMode, _BatchNorm):
    """Base of the layers for each number of dimensions.

    Parameters beyond torch.nn's: `statistics` (see `StatisticsMode`) and `example_weight`, 0 to 1: how much of each
    example's own statistics inference mixes into the stored ones (see `normalise_with_own_statistics`).

    Raises:
        TooFewValuesError: a training batch has a single value for each channel.
        ValueError: inference lacks population statistics; the input has the wrong number of dimensions or channels;
            eps is 0 or less. Messages name the layer.
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
        **more: Any,  # `bias`, in the versions of torch that have it
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **more)
        if not 0 <= example_weight <= 1:
            raise ValueError(f"example_weight must be from 0 to 1, not {example_weight}")
        self.statistics = statistics
        self.example_weight = example_weight

    def forward(self, input: Tensor, *, relu: bool = False) -> Tensor:
        """Normalise a batch, N x C x ..., to the same shape.

        An empty batch has an empty result; it leaves the running statistics and is counted, as in torch.nn. Where
        backward runs the forward again, as within `torch.utils.checkpoint`, nothing moves or is counted twice.
        With `relu`, ReLU follows, and backward needs one tensor of that size instead of two (see `save_memory.py`).
        """
        self._check_shape(input)
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or not self._uses_stored_statistics():
            y, updated = self._by_batch(input, mean, var, self.weight, self.bias, eps=self.eps, relu=relu)
            if self._in_training() and not runs_again():
                self._count_batch(updated)
            return y  # N x C x ...
        if self.eps < 0:
            raise ValueError(f"batch_norm eps must be non-negative, but got {self.eps} at {layer_name(self)}")
        y = self._by_stored(input, mean, var, self.weight, self.bias, self.eps)  # N x C x ...
        return F.relu(y, inplace=True) if relu else y

    def _by_stored(
        self, input: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        if self.example_weight:
            return normalise_with_own_statistics(input, mean, var, weight, bias, eps, self.example_weight)
        return kernels.by_statistics(input, mean, var, weight, bias, eps)

    def _by_batch(
        self,
        input: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        momentum: float | None = None,
        *,
        eps: float,
        relu: bool = False,
    ) -> tuple[Tensor, bool | Tensor]:
        """Normalise by the batch and, in training, move the running mean and variance; return as `_transform` does."""
        self._check_batch_size(input)
        if eps <= 0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps} at {layer_name(self)}")
        running = None
        if mean is not None and var is not None and self._in_training() and self._updates_running():
            if runs_again():  # the kernel gets copies, not None, because checkpoints compare what autograd keeps
                mean, var = mean.clone(), var.clone()
            running = Running(mean, var, self._weight_of_new_batch() if momentum is None else momentum)
        return self._transform(input, weight, bias, running, eps, relu=relu)

    def _check_shape(self, input: Tensor) -> None:
        try:
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
        except ValueError as error:
            if type(error) is not ValueError:  # a tracer's own
                raise
            raise ValueError(f"{error} at {layer_name(self)}") from None
        self._check_channels(input)

    def _check_channels(self, input: Tensor) -> None:
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{layer_name(self)} is for {self.num_features} channels, and got {input.shape[1]}: {list(input.shape)}"
            )

    def extra_repr(self) -> str:
        more = [f"statistics={self.statistics!r}"] * (self.statistics != "running")
        more += [f"example_weight={self.example_weight}"] * bool(self.example_weight)
        return ", ".join([super().extra_repr(), *more, *["frozen"] * self.frozen])  # type: ignore[no-untyped-call]

    def _transform(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: Running | None,
        eps: float,
        *,
        relu: bool,
    ) -> tuple[Tensor, bool | Tensor]:
        """Normalise by the batch and update the running statistics; subclasses override this step.

        Returns the normalised batch, N x C x ..., and whether the running statistics were updated.
        """
        if relu:
            return batch_norm_relu(input, weight, bias, running, eps)
        normalised = kernels.by_batch(input, weight, bias, running, eps)
        return normalised.y, normalised.updated


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):
    """Batch normalisation of N x C, or N x C x L."""


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):
    """Batch normalisation of N x C x H x W."""


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):
    """Batch normalisation of N x C x D x H x W."""


def normalise_with_own_statistics(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, example_weight: float
) -> Tensor:
    """Normalise each example by a mixture of the given statistics (C each) and its own, of weight `example_weight`.

    Training normalises each example by a batch that contains it; plain inference does not, so an example has less
    influence on its own normalisation than the weights were trained for (its weight in a batch of B is 1 / B).
    Mixing its own statistics in restores that influence: Summers & Dinneen 2020, "Four things everyone should know to
    improve batch normalization", arXiv 1906.03548, sec. 3.1, who choose the weight w on validation data.

    The first two moments are mixed, E[x] and E[x^2]. The mixture's variance is
    (1 - w) var + w var_own + w (1 - w) (mean - mean_own)^2: E[x^2] - E[x]^2 without their cancellation.
    """
    weight, dtype = example_weight, x.dtype
    x = x.to(torch.promote_types(dtype, torch.float32))  # squares would not fit into float16
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean, var = mean.view(shape), var.view(shape)  # 1 x C x 1 ...
    own_mean, own_var = x, x.new_zeros(())  # one value is its own mean
    if x.ndim > 2:
        positions = list(range(2, x.ndim))
        own_mean = x.mean(positions, keepdim=True)  # N x C x 1 ...
        own_var = (x - own_mean).square().mean(positions, keepdim=True)
    apart = own_mean - mean
    mixed_var = (1 - weight) * var + weight * own_var + weight * (1 - weight) * apart.square()
    y = (x - mean - weight * apart) * (mixed_var + eps).rsqrt()  # N x C x ...
    if gamma is not None:
        y = y * gamma.view(shape)
    return (y if beta is None else y + beta.view(shape)).to(dtype)


def is_plain_class(kind: type[nn.Module]) -> bool:
    """Whether a class's forward is batch normalisation and nothing else: a subclass may add an activation, say."""
    return kind.forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward, BatchNorm.forward)


def is_plain(layer: _BatchNorm) -> bool:
    """Whether a layer's forward is batch normalisation and nothing else."""
    return is_plain_class(type(layer)) and "forward" not in vars(layer)


def batch_norm_layers(model: nn.Module) -> Iterator[tuple[str, _BatchNorm]]:
    """Yield every batch normalisation layer of a model once, torch.nn's and bnlab's, with its first name."""
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            yield name, module
