"""A layer that is checked: copies and inputs of it, and comparisons with the reference.

Each forward runs on a new deep copy, whose parameters and statistics are random numbers, always the same ones, and
whose dropout is switched off. A layer in half precision is converted to float32, in which rounding hides less.

Shapes: N images, C channels, then any number of positions.
"""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from bnlab.errors import UsageError, plural
from bnlab.norm import reference
from bnlab.norm.model_utils import copy_module

Activation = Callable[[Tensor], Tensor]

BATCHES = 3  # what num_batches_tracked is before a check

# Of the largest value that is expected, or of 1, the size of the input, where they cancel. float32 sums of some hundred
# values are good to a few units of 1.2e-7; a wrong convention, such as a biased variance, shows in the third or fourth
# digit. Rounding grows with the root of the number of values.
_CLOSE = {torch.float32: 1e-5, torch.float64: 1e-10}
_MANY = 1000  # values a channel, from where it does
_FEWEST = 8  # values a channel: of two, the variance may be so small that rounding decides about all
_SIZES = {2: (16,), 3: (8, 6), 4: (8, 6, 5), 5: (4, 4, 3, 2)}  # N and positions, by the number of dimensions


class CheckError(AssertionError):
    """A check failed; not an assertion of the layer's own."""


def require(holds: bool, expected: str, found: str) -> None:
    """Assert, with `python -O` too, which removes assert statements."""
    if not holds:
        raise CheckError(f"expected {expected}, found {found}")


class Probe:
    """A layer that is checked: makes copies and inputs of it, and compares."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...] | None, activation: Activation | None) -> None:
        missing = [name for name in ("num_features", "eps", "momentum") if not hasattr(layer, name)]
        missing += [name for name in ("running_mean", "running_var") if getattr(layer, name, None) is None]
        if missing:
            raise UsageError(
                f"{type(layer).__name__} has no {' and no '.join(missing)}",
                "pass a batch normalisation layer that keeps running statistics",
            )
        self.layer, self.kind = layer, type(layer).__name__
        self.activation: Activation = activation or (lambda x: x)
        if isinstance(activation, nn.Module):
            self.activation = copy.deepcopy(activation).cpu().double()
        self.has_activation = activation is not None
        running_mean: Tensor = layer.running_mean  # type: ignore[assignment]
        self.device, self.dtype = running_mean.device, torch.promote_types(running_mean.dtype, torch.float32)
        self.shape = shape or self._default_shape()
        values = math.prod(self.shape) // max(self.channels, 1)
        if len(self.shape) < 2 or self.shape[0] < 2 or self.shape[1] != self.channels or values < _FEWEST:
            raise UsageError(
                f"shape {tuple(self.shape)} does not fit {self.kind}",
                f"pass N x C x ... with at least 2 images, {self.channels} channels and {_FEWEST} values a channel",
            )
        self.tolerance = _CLOSE[self.dtype] * max(1.0, math.sqrt(values / _MANY))

    @property
    def channels(self) -> int:
        return int(self.layer.num_features)  # type: ignore[arg-type]

    def _default_shape(self) -> tuple[int, ...]:
        known = {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
        dimensions = next(([n] for kind, n in known.items() if isinstance(self.layer, kind)), [4, 2, 3, 5])
        shapes = [(_SIZES[n][0], self.channels, *_SIZES[n][1:]) for n in dimensions]
        if len(shapes) == 1:
            return shapes[0]
        errors = []
        for shape in shapes:
            try:
                self.copy(training=False)(torch.zeros(shape, dtype=self.dtype, device=self.device))
            except Exception as error:  # of any type: it is the caller's own code
                errors.append(error)
            else:
                return shape
        raise UsageError(
            f"{self.kind} does not run on 4, 2, 3 or 5 dimensions ({type(errors[0]).__name__} with 4)",
            "pass the shape of its input",
        ) from errors[0]

    def copy(self, *, training: bool, scale: float = 1.0, mean: float | None = None) -> Any:
        """A copy in that mode, whose parameters and statistics are random: variances of about scale^2."""
        layer = copy_module(self.layer)
        shared = {id(tensor) for tensor in (*self.layer.parameters(), *self.layer.buffers())}
        for module in layer.modules():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if id(tensor) in shared:  # by a __deepcopy__ of the layer's own
                    table = module._parameters if name in module._parameters else module._buffers
                    table[name] = type(tensor)(tensor.detach().clone())
            if isinstance(module, _DropoutNd):
                module.p = 0.0
        layer = layer.to(self.dtype).train(training).requires_grad_(True)
        with torch.no_grad():
            for seed, name in enumerate(("weight", "bias", "running_mean", "running_var"), 10):
                tensor = getattr(layer, name, None)
                if tensor is not None:
                    values = random_values(seed, self.channels)
                    if name in ("weight", "running_var"):  # not near 0; gamma has both signs
                        values = values + 0.5 * values.sign() if name == "weight" else values.abs() + 0.5
                    if name == "running_mean":
                        values = scale * values if mean is None else values.fill_(mean)
                    tensor.copy_(scale**2 * values if name == "running_var" else values)
            if getattr(layer, "num_batches_tracked", None) is not None:
                layer.num_batches_tracked.fill_(BATCHES)
        return layer

    def input(self, *, scale: float = 1.0, mean: float = 1.0, seed: int = 0) -> Tensor:
        """Values of a standard deviation of 2 and of a mean of 1, times scale."""
        x = scale * (2 * random_values(seed, *self.shape) + mean)  # N x C x ...
        return x.to(self.dtype).to(self.device)

    def reference(self, layer: Any, x: Tensor, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        """The reference's output in float64, before the activation, and its x, gamma and beta, which take gradients."""
        parameters = (getattr(layer, "weight", None), getattr(layer, "bias", None))
        gamma, beta = (x.new_full([self.channels], 1.0 - i) if p is None else p for i, p in enumerate(parameters))
        leaves = [tensor.detach().cpu().double().requires_grad_(True) for tensor in (x, gamma, beta)]
        x, gamma, beta = leaves
        if training:
            return reference.transform(x, gamma, beta, layer.eps).y, leaves
        mean, var = layer.running_mean.cpu(), layer.running_var.cpu()
        return reference.inference(x, gamma, beta, mean, var, layer.eps), leaves

    def close(self, found: Any, expected: Tensor, what: str, tolerance: float | None = None) -> None:
        """Assert that tensors differ by no more than `tolerance`, as a part of the largest value expected, or of 1."""
        require(isinstance(found, Tensor), f"{what} to be a tensor", type(found).__name__)
        require(found.shape == expected.shape, f"{what} of shape {[*expected.shape]}", f"{[*found.shape]}")
        tolerance = self.tolerance if tolerance is None else tolerance
        found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
        off = (found - expected).abs().nan_to_num(torch.inf)
        worst, part = int(off.argmax()), float(off.max() / expected.abs().max().clamp(min=1))
        one, other = float(found.flatten()[worst]), float(expected.flatten()[worst])
        difference = f"by {part:.2g} of the largest value or of 1, and {tolerance:.2g} is allowed"
        require(part <= tolerance, f"{what} to be {other:.7g}", f"{one:.7g} where they differ most ({difference})")

    def compare_output(self, *, training: bool, what: str, scale: float = 1.0) -> None:
        layer, x = self.copy(training=training, scale=scale), self.input(scale=scale)
        expected, _ = self.reference(layer, x, training=training)
        self.close(layer(x), self.activation(expected), what)

    def compare_gradients(self, *, training: bool) -> None:
        layer, x = self.copy(training=training), self.input().requires_grad_(True)
        expected, leaves = self.reference(layer, x, training=training)
        dy = random_values(1, *self.shape)
        if self.has_activation:  # usual ones have kinks at whole numbers, where rounding decides about the gradient
            dy[(expected - expected.round()).abs() < 1e-3] = 0
        y, parameters = layer(x), [getattr(layer, "weight", None), getattr(layer, "bias", None)]
        wanted = [x, *(p for p in parameters if p is not None)]
        found = torch.autograd.grad(y, wanted, dy.to(y), allow_unused=True)
        right = torch.autograd.grad(self.activation(expected), leaves, dy)
        shown = [True, *(p is not None for p in parameters)]
        named = [(n, g) for n, g, show in zip(("the input", "gamma", "beta"), right, shown, strict=True) if show]
        for own, (name, gradient) in zip(found, named, strict=True):
            self.close(torch.zeros(()) if own is None else own, gradient, f"the gradient of {name}")

    def compare_update(self, layer: Any, batches: int, what: str) -> None:
        """Run batches in training, and compare the running statistics with their exponential or plain average."""
        mean, var = (t.to("cpu", torch.float64, copy=True) for t in (layer.running_mean, layer.running_var))  # C, C
        dims = [d for d in range(len(self.shape)) if d != 1]
        for i in range(batches):
            x = self.input(seed=20 + i)
            layer(x)
            momentum = 1 / (1 + i) if layer.momentum is None else layer.momentum
            mean = mean.lerp(x.double().cpu().mean(dims), momentum)
            var = var.lerp(x.double().cpu().var(dims, unbiased=True), momentum)
        self.close(layer.running_mean, mean, f"the running mean after {batches} batches {what}")
        self.close(layer.running_var, var, f"the running variance after {batches} batches {what}")


def random_values(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def state(layer: Any) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, those that are not persistent too."""
    return {name: t.detach().clone() for name, t in (*layer.named_parameters(), *layer.named_buffers())}


def assert_unchanged(before: Mapping[str, Tensor], layer: Any, what: str) -> None:
    after = state(layer)
    names = [n for n in {**before, **after} if n not in before or n not in after or not before[n].equal(after[n])]
    require(not names, f"{what} to change no parameter or buffer", f"{', '.join(names)} changed")


def assert_finite(tensor: Tensor | None, what: str) -> None:
    number = 0 if tensor is None else int((~tensor.isfinite()).sum())
    require(not number, f"{what} to be finite", f"{plural(number, 'value')} NaN or infinite")
