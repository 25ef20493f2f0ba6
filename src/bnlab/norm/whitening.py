"""Whitening layers, which batch normalisation simplifies because "the full whitening of each layer's inputs is costly".

    y = (Sigma + eps I)^(-1/2) (x - E[x]) * gamma + beta          (Ioffe & Szegedy 2015, arXiv 1502.03167, sec. 2 and 3)

Sigma is the D x D covariance of the channels of one group, over all examples and positions; with D = 1 this is batch
normalisation. Of all roots of Sigma's inverse this is the symmetric one (ZCA), which changes x least. The root of PCA
swaps its axes from batch to batch, and networks do not train with it (Huang et al. 2018, Decorrelated Batch
Normalization, arXiv 1804.08450, sec. 3.2 and 3.3, who also give the gradient of the eigenvectors).

Training uses E and Sigma of the batch, Sigma biased (divided by m). The running statistics move towards those of the
batch by `momentum`, the weight of the new batch, with Sigma unbiased (divided by m - 1). With `momentum=None` they are
the plain average of all batches so far. A batch whose statistics are not finite does not move them. Inference uses what
`statistics` names (see `StatisticsMode` in `layers.py`).

A batch of fewer than D values a channel makes Sigma singular. Then eps alone scales the directions that the batch
lacks, and later data in these directions are multiplied by 1 / sqrt(eps). Use groups of fewer channels, larger batches
or a larger eps.

Shapes: N examples, C = groups * D channels, then any number of positions; m values a channel.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnlab.norm import moments
from bnlab.norm.layers import Statistics, StatisticsMode
from bnlab.norm.model_utils import layer_name, runs_again
from bnlab.norm.moments import Moments


class _InverseSqrt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, least: float) -> Tensor:
        matrix = matrix / 2 + matrix.mT / 2  # eigh reads one triangle alone
        finite = matrix.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)  # ... x 1 x 1
        eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        values, vectors = torch.linalg.eigh(torch.where(finite, matrix, eye))  # eigh raises where one is not finite
        roots = values.clamp(min=max(least, torch.finfo(matrix.dtype).tiny)).sqrt()  # ... x D
        ctx.save_for_backward(roots, vectors)
        return torch.where(finite, (vectors / roots.unsqueeze(-2)) @ vectors.mT, torch.nan)  # ... x D x D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        roots, vectors = ctx.saved_tensors
        of_row, of_column = roots.unsqueeze(-1), roots.unsqueeze(-2)
        inner = vectors.mT @ (grad / 2 + grad.mT / 2) @ vectors  # ... x D x D
        inner = -inner / (of_row * of_column * (of_row + of_column))
        return vectors @ inner @ vectors.mT, None


def inverse_sqrt(matrix: Tensor, least: float = 0.0) -> Tensor:
    """Return the symmetric A^(-1/2) of symmetric positive matrices A, ... x D x D; NaN for one that is not finite.

    An eigenvalue below `least`, which only rounding can cause, counts as `least`. The gradient is that of Daleckii and
    Krein (Bhatia 1997, Matrix Analysis, theorem V.3.3): with A = U diag(l) U^T and G the gradient in the result,

        U (K * U^T G U) U^T,    K_ij = (f(l_i) - f(l_j)) / (l_i - l_j) = -1 / (sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j)))

    whose last form has no difference in it. (The gradient of `torch.linalg.eigh` is NaN where eigenvalues are equal.)
    The gradient itself cannot be differentiated.
    """
    return _InverseSqrt.apply(matrix, least)  # type: ignore[no-any-return, no-untyped-call]


class _CachedMatrix(NamedTuple):
    """The whitening `matrix` of a running covariance, and what it was computed from."""

    matrix: Tensor
    covariance: Tensor
    key: tuple[torch.dtype, torch.device, float]  # the float is eps


class Whitening(StatisticsMode):
    """Base of the layers for each number of dimensions.

    Parameters are those of torch.nn.BatchNorm1d; `groups`, the number of groups that C channels are divided into, in
    their order, each of which is whitened by itself (C groups are batch normalisation); and `statistics` (see
    `StatisticsMode`).

    Statistics are computed in float32 at least. The error of y is about 1e-7 times the condition number of
    Sigma + eps I. The output has the input's dtype and memory format. A layer that is cast to half precision stores
    its statistics in half precision, too coarse for small eigenvalues: leave the layer in float32, which accepts
    inputs in half precision too.

    Raises:
        TooFewValuesError: a training batch has a single value for each channel.
        ValueError: `groups` does not divide C; the input has the wrong shape or is not of floating point; eps is 0 in
            training; inference lacks population statistics.
    """

    takes: ClassVar[dict[int, str]]  # the accepted shapes of an input, by its number of dimensions

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_covariance: Tensor | None
    _cached_matrix: _CachedMatrix | None = None

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
        groups: int = 1,
        statistics: Statistics = "running",
    ) -> None:
        super().__init__()
        if groups < 1 or num_features % groups:
            raise ValueError(
                f"{type(self).__name__} cannot divide {num_features} channels into groups={groups}: "
                f"take one of {', '.join(str(n) for n in range(1, num_features + 1) if not num_features % n)}"
            )
        self.num_features, self.groups, self.eps, self.momentum = num_features, groups, eps, momentum
        self.affine, self.track_running_stats = affine, track_running_stats
        for name in ("weight", "bias"):
            values = torch.empty(num_features, device=device, dtype=dtype) if affine else None
            self.register_parameter(name, None if values is None else nn.Parameter(values))
        size = num_features // groups
        for name, shape in (("running_mean", (num_features,)), ("running_covariance", (groups, size, size))):
            self.register_buffer(name, torch.empty(shape, device=device, dtype=dtype) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if track_running_stats else None)
        self.statistics = statistics
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Reset the running mean to 0, the running covariance to the identity and the count of batches to 0."""
        if self.running_mean is None or self.running_covariance is None or self.num_batches_tracked is None:
            return
        self.running_mean.zero_()
        self.running_covariance.zero_().diagonal(dim1=1, dim2=2).fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Reset the running statistics, gamma to 1 and beta to 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Whiten a batch, N x C x ..., to the same shape; empty batches and checkpoints are as in `BatchNorm`."""
        self._check_shape(input)
        by_stored = self.running_mean is not None and self._uses_stored_statistics()
        if not by_stored:
            self._check_batch_size(input)
        if self.eps < 0 or (self.eps == 0 and not by_stored):
            raise ValueError(f"{layer_name(self)} needs an eps above 0, not {self.eps}: covariances may be singular")
        precision = torch.float64 if input.dtype == torch.float64 else torch.float32
        kind = input.device.type if torch.amp.is_autocast_available(input.device.type) else "cpu"
        with torch.autocast(kind, enabled=False):  # autocast would compute covariances in half precision
            channels = input.to(precision).transpose(0, 1)  # C x N x ...
            values = channels.reshape(self.groups, self.num_features // self.groups, -1)  # groups x D x m
            y = self._by_running(values) if by_stored else self._by_batch(values)  # groups x D x m
        y = y.reshape(channels.shape).transpose(0, 1)  # N x C x ...
        last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        return y.to(input.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def measure(self, x: Tensor) -> Moments:
        """Measure the moments of a batch in this layer's groups."""
        self._check_shape(x)
        return moments.measure_covariance(x, self.groups)

    def extra_repr(self) -> str:
        shown = [str(self.num_features)]
        shown += [f"{n}={getattr(self, n)}" for n in ("eps", "momentum", "affine", "track_running_stats", "groups")]
        shown += [f"statistics={self.statistics!r}"] * (self.statistics != "running")
        return ", ".join([*shown, *["frozen"] * self.frozen])

    def _by_batch(self, values: Tensor) -> Tensor:
        """Whiten by the batch's own statistics, and update the running ones; groups x D x m."""
        trains = self._in_training() and not runs_again()
        if not values.shape[2]:  # an empty batch
            if trains:
                self._count_batch(self._updates_running())
            return self._transform(values, torch.eye(values.shape[1]).to(values).expand(self.groups, -1, -1), None)
        shift = values.detach().mean(2, keepdim=True)  # groups x D x 1; values near 0 keep differences from cancelling
        values, count = values - shift, values.shape[2]
        mean = values.mean(2, keepdim=True)  # groups x D x 1; what rounding left
        covariance = values @ values.mT / count - mean @ mean.mT  # groups x D x D
        if trains:
            self._count_batch(self._update_running((shift + mean.detach()).flatten(), covariance.detach(), count))
        return self._transform(values, self._root_of(covariance), mean)

    def _by_running(self, values: Tensor) -> Tensor:
        assert self.running_mean is not None
        mean = self.running_mean.to(values.dtype).view(self.groups, -1, 1)  # groups x D x 1
        return self._transform(values - mean, self._root_of_running(values.dtype), None)

    def _transform(self, values: Tensor, root: Tensor, mean: Tensor | None) -> Tensor:
        """Compute gamma * root (values - mean) + beta as one product of matrices; groups x D x m."""
        if self.weight is not None:
            root = self.weight.to(root.dtype).view(self.groups, -1, 1) * root  # groups x D x D
        offset = torch.zeros_like(root[..., :1]) if mean is None else -(root @ mean)  # groups x D x 1
        if self.bias is not None:
            offset = offset + self.bias.to(root.dtype).view_as(offset)
        return torch.baddbmm(offset, root, values)  # groups x D x m

    @torch.no_grad()
    def _update_running(self, mean: Tensor, covariance: Tensor, count: int) -> bool | Tensor:
        """Move the running statistics towards the batch's; return whether they moved, which only the device knows."""
        if self.running_mean is None or self.running_covariance is None or not self._updates_running():
            return False
        momentum = self._weight_of_new_batch()
        finite = mean.isfinite().all() & covariance.isfinite().all()
        unbiased = covariance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_covariance, unbiased)):
            wide = torch.promote_types(running.dtype, new.dtype)
            moved = running.to(wide).lerp(new.to(wide), momentum)
            running.copy_(torch.where(finite, moved, running))
        return finite

    def _root_of(self, covariance: Tensor) -> Tensor:
        """Return (Sigma + eps I)^(-1/2), groups x D x D."""
        eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        return inverse_sqrt(covariance + self.eps * eye, self.eps)

    def _root_of_running(self, dtype: torch.dtype) -> Tensor:
        """Return the root of the running covariance, cached for as long as the covariance has the same values.

        Comparing D^2 values is cheap next to the D^3 of `eigh`, and correct whoever changed them.
        """
        assert self.running_covariance is not None
        covariance, cached = self.running_covariance.to(dtype), self._cached_matrix
        if torch.compiler.is_compiling() or covariance.is_meta:  # no values to compare
            return self._root_of(covariance)
        key = dtype, covariance.device, self.eps
        if cached is None or cached.key != key or not torch.equal(cached.covariance, covariance):
            with torch.inference_mode(False), torch.no_grad():  # a later backward cannot use a tensor of inference mode
                cached = _CachedMatrix(self._root_of(covariance), covariance.clone(), key)
            self._cached_matrix = cached
        return cached.matrix

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_cached_matrix"}

    def _check_shape(self, input: Tensor) -> None:
        if input.ndim not in self.takes:
            raise ValueError(
                f"{layer_name(self)} takes {' or '.join(self.takes.values())}, and got {list(input.shape)}: "
                "Whitening2d is for images, Whitening1d for vectors and sequences"
            )
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{layer_name(self)} is for {self.num_features} channels, and got {input.shape[1]}: "
                f"{list(input.shape)}; make it with num_features={input.shape[1]}"
            )
        if not input.is_floating_point():
            raise ValueError(f"{layer_name(self)} takes floating-point input, not {input.dtype}: call float() on it")


class Whitening1d(Whitening):
    """Whitening of N x C, or N x C x L."""

    takes: ClassVar = {2: "N x C", 3: "N x C x L"}


class Whitening2d(Whitening):
    """Whitening of N x C x H x W."""

    takes: ClassVar = {4: "N x C x H x W"}
