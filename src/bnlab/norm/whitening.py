"""Whitening layers: what batch normalisation simplifies, because "the full whitening of each layer's inputs is costly".

    y = (Sigma + eps I)^(-1/2) (x - E[x]) * gamma + beta          (Ioffe & Szegedy 2015, arXiv 1502.03167, sec. 2 and 3)

Sigma is the D x D covariance of the channels of one group, over all examples and positions; with D = 1 this is batch
normalisation. Of all roots of Sigma's inverse this takes the symmetric one (ZCA), which changes x least: that of PCA
swaps its axes from batch to batch, and networks do not train with it (Huang et al. 2018, Decorrelated Batch
Normalization, arXiv 1804.08450, sec. 3.2 and 3.3, who have the gradient of the eigenvectors too).

Training: E and Sigma are those of the batch, Sigma biased (divided by m). The running ones move towards the batch's by
`momentum`, the weight of the new batch, with Sigma unbiased (m - 1); with `momentum=None` they are the plain average of
all batches so far. A batch whose statistics are not finite does not move them. Inference: as `statistics` says (see
`modes.py`).

A batch of fewer than D values a channel leaves Sigma singular: eps alone carries the directions that it does not have,
which later data meet multiplied by 1 / sqrt(eps). Take groups of fewer channels, larger batches or a larger eps.

Shapes: N examples, C = groups * D channels, then any number of positions; m values a channel.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bnlab.norm import moments as measuring
from bnlab.norm.modes import Statistics, StatisticsMode
from bnlab.norm.moments import Moments
from bnlab.norm.naming import name_of


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
    """The symmetric A^(-1/2) of symmetric positive matrices A, ... x D x D; NaN for one that is not finite.

    No eigenvalue is taken to be below `least`: what rounding makes of one that cannot be. The gradient is that of
    Daleckii and Krein (Bhatia 1997, Matrix Analysis, theorem V.3.3): with A = U diag(l) U^T and G the gradient in the
    result,

        U (K * U^T G U) U^T,    K_ij = (f(l_i) - f(l_j)) / (l_i - l_j) = -1 / (sqrt(l_i l_j) (sqrt(l_i) + sqrt(l_j)))

    whose last form has no difference in it. Through `torch.linalg.eigh` equal eigenvalues would give NaN. There is no
    gradient of the gradient.
    """
    return _InverseSqrt.apply(matrix, least)  # type: ignore[no-any-return, no-untyped-call]


class _Known(NamedTuple):
    """The whitening `matrix` of a running covariance, and what it was made of."""

    matrix: Tensor
    covariance: Tensor
    eps: float


class Whitening(StatisticsMode):
    """What the layers of every number of dimensions share.

    Parameters as torch.nn.BatchNorm's, and: `groups`, that C channels are divided into, in their order, each whitened
    for itself (C groups are batch normalisation); `statistics` (see `modes.py`).

    Statistics are float32 at least, and the error of y about 1e-7 times the condition number of Sigma + eps I; the
    output has the input's dtype and memory format. A layer cast to half precision stores its statistics in it, too
    coarse for small eigenvalues: leave it in float32, which takes half precision input too.

    Raises:
        ValueError: `groups` does not divide C; an input of the wrong shape or not of floating point; in training, an
            empty batch, one with a single value for each channel, or eps 0; inference without population statistics.
    """

    takes: ClassVar[dict[int, str]]
    """the shapes of an input, by its number of dimensions"""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_covariance: Tensor | None
    _known: _Known | None = None

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
        tracked = track_running_stats
        self.register_buffer("running_mean", torch.empty(num_features, device=device, dtype=dtype) if tracked else None)
        self.register_buffer(
            "running_covariance", torch.empty(groups, size, size, device=device, dtype=dtype) if tracked else None
        )
        self.register_buffer("num_batches_tracked", torch.tensor(0, device=device) if tracked else None)
        self.statistics = statistics
        self.reset_parameters()

    def reset_running_stats(self) -> None:
        """Mean 0, covariance the identity, of no batches."""
        if self.running_mean is None or self.running_covariance is None or self.num_batches_tracked is None:
            return
        self.running_mean.zero_()
        self.running_covariance.zero_().diagonal(dim1=1, dim2=2).fill_(1)
        self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Everything as in a new layer: gamma 1, beta 0."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """The whitened batch, N x C x ... as it came."""
        self._check_shape(input)
        by_stored = self.running_mean is not None and self.running_covariance is not None and self._by_stored()
        if not by_stored:
            self._check_size(input)
        if self.eps < 0 or (self.eps == 0 and not by_stored):
            raise ValueError(f"{name_of(self)} needs an eps above 0, not {self.eps}: covariances may be singular")
        precision = torch.float64 if input.dtype == torch.float64 else torch.float32
        kind = input.device.type if torch.amp.is_autocast_available(input.device.type) else "cpu"
        with torch.autocast(kind, enabled=False):  # it would take covariances in half precision
            channels = input.to(precision).transpose(0, 1)  # C x N x ...
            values = channels.reshape(self.groups, self.num_features // self.groups, -1)  # groups x D x m
            y = self._by_running(values) if by_stored else self._by_batch(values)  # groups x D x m
        y = y.reshape(channels.shape).transpose(0, 1)  # N x C x ...
        last = input.ndim == 4 and input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous()
        return y.to(input.dtype).contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)

    def measure(self, x: Tensor) -> Moments:
        """The moments of a batch as this layer's groups have them: what `store` takes."""
        self._check_shape(x)
        return measuring.measure_covariance(x, self.groups)

    @torch.no_grad()
    def store(self, moments: Moments, batches: int) -> None:
        """Take these for the running statistics, the covariance unbiased; they were measured on so many `batches`.

        Raises:
            ValueError: the layer keeps no statistics.
        """
        if self.running_mean is None or self.running_covariance is None or self.num_batches_tracked is None:
            raise ValueError(f"{name_of(self)} keeps no running statistics: make it with track_running_stats=True")
        assert moments.scatter.shape == self.running_covariance.shape  # copy_ would broadcast
        self.running_mean.copy_(moments.mean)
        self.running_covariance.copy_(moments.variance(unbiased=True))
        self.num_batches_tracked.fill_(batches)

    def extra_repr(self) -> str:
        """As torch.nn.BatchNorm's, and what is not as there."""
        shown = [str(self.num_features)]
        shown += [f"{n}={getattr(self, n)}" for n in ("eps", "momentum", "affine", "track_running_stats", "groups")]
        shown += [f"statistics={self.statistics!r}"] * (self.statistics != "running")
        return ", ".join([*shown, *["frozen"] * self.frozen])

    def _by_batch(self, values: Tensor) -> Tensor:
        """Whiten by the batch's own statistics, and move the running ones; groups x D x m."""
        shift = values.detach().mean(2, keepdim=True)  # groups x D x 1; near the mean, so that no difference cancels
        values, count = values - shift, values.shape[2]
        mean = values.mean(2, keepdim=True)  # groups x D x 1; what rounding left of it
        covariance = values @ values.mT / count - mean @ mean.mT  # groups x D x D
        if self._moves():
            self._count(self._move((shift + mean.detach()).flatten(), covariance.detach(), count))
        return self._transform(values, self._root_of(covariance), mean)

    def _by_running(self, values: Tensor) -> Tensor:
        """Whiten by what is stored; groups x D x m."""
        assert self.running_mean is not None
        mean = self.running_mean.to(values.dtype).view(self.groups, -1, 1)  # groups x D x 1
        return self._transform(values - mean, self._root_of_running(values.dtype), None)

    def _transform(self, values: Tensor, root: Tensor, mean: Tensor | None) -> Tensor:
        """gamma * root (values - mean) + beta as one product of matrices; groups x D x m."""
        if self.weight is not None:
            root = self.weight.to(root.dtype).view(self.groups, -1, 1) * root  # groups x D x D
        offset = torch.zeros_like(root[..., :1]) if mean is None else -(root @ mean)  # groups x D x 1
        if self.bias is not None:
            offset = offset + self.bias.to(root.dtype).view_as(offset)
        return torch.baddbmm(offset, root, values)  # groups x D x m

    @torch.no_grad()
    def _move(self, mean: Tensor, covariance: Tensor, count: int) -> bool | Tensor:
        """Move the running statistics; whether they moved, which the device alone knows."""
        if self.running_mean is None or self.running_covariance is None or not self.track_running_stats:
            return False
        if self.statistics == "population":
            return False
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / (1 + (0 if self.num_batches_tracked is None else int(self.num_batches_tracked)))
        finite = mean.isfinite().all() & covariance.isfinite().all()
        unbiased = covariance * (count / (count - 1))
        for running, new in ((self.running_mean, mean), (self.running_covariance, unbiased)):
            wide = torch.promote_types(running.dtype, new.dtype)
            moved = running.to(wide).lerp(new.to(wide), momentum)
            running.copy_(torch.where(finite, moved, running))
        return finite

    def _root_of(self, covariance: Tensor) -> Tensor:
        """(Sigma + eps I)^(-1/2), groups x D x D."""
        eye = torch.eye(covariance.shape[1], dtype=covariance.dtype, device=covariance.device)
        return inverse_sqrt(covariance + self.eps * eye, self.eps)

    def _root_of_running(self, dtype: torch.dtype) -> Tensor:
        """That of the running covariance, kept for as long as this has the values it was made of.

        Comparing D^2 values is cheap beside the D^3 of `eigh`, and right whoever wrote them and however.
        """
        assert self.running_covariance is not None
        covariance, known = self.running_covariance, self._known
        if torch.compiler.is_compiling() or covariance.is_meta:  # no values to compare
            return self._root_of(covariance.to(dtype))
        if known is not None:
            kinds = [(t.dtype, t.device) for t in (known.matrix, known.covariance)]
            same = kinds == [(dtype, covariance.device), (covariance.dtype, covariance.device)]
            if same and known.eps == self.eps and torch.equal(known.covariance, covariance):
                return known.matrix
        with torch.inference_mode(False), torch.no_grad():  # what inference mode makes, no later backward could use
            known = _Known(self._root_of(covariance.to(dtype)), covariance.clone(), self.eps)
        self._known = known
        return known.matrix

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_known"}

    def _check_shape(self, input: Tensor) -> None:
        if input.ndim not in self.takes:
            raise ValueError(
                f"{name_of(self)} takes {' or '.join(self.takes.values())}, and got {list(input.shape)}: "
                "Whitening2d is for images, Whitening1d for vectors and sequences"
            )
        if input.shape[1] != self.num_features:
            raise ValueError(
                f"{name_of(self)} is for {self.num_features} channels, and got {input.shape[1]}: {list(input.shape)}; "
                f"make it with num_features={input.shape[1]}"
            )
        if not input.is_floating_point():
            raise ValueError(f"{name_of(self)} takes floating point, and got {input.dtype}: call float() on the input")


class Whitening1d(Whitening):
    """Over N x C, or N x C x L."""

    takes: ClassVar = {2: "N x C", 3: "N x C x L"}


class Whitening2d(Whitening):
    """Over N x C x H x W."""

    takes: ClassVar = {4: "N x C x H x W"}
