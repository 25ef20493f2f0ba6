"""Batch normalisation by hand, and layers that get one thing wrong; all at the top of a module, for pickle."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ByHand(nn.Module):
    """Somebody's own batch normalisation, of any number of dimensions; correct."""

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.evaluate(x)
        self.refuse(x)
        mean, var = self.measure(x)
        with torch.no_grad():
            self.count()
            self.store(mean, self.stored_variance(var, x.numel() // self.num_features), self.weight_of_batch())
        return self.normalise(x, mean, var)

    def evaluate(self, x: Tensor) -> Tensor:
        return self.normalise(x, self.running_mean, self.running_var)

    def refuse(self, x: Tensor) -> None:
        if x.numel() == self.num_features:
            raise ValueError("one value a channel")

    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        return x.mean(dims), x.var(dims, unbiased=False)

    def count(self) -> None:
        self.num_batches_tracked += 1

    def stored_variance(self, var: Tensor, m: int) -> Tensor:
        return var * m / (m - 1)

    def weight_of_batch(self) -> float:
        return 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum

    def store(self, mean: Tensor, var: Tensor, weight: float) -> None:
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(var, weight)

    def normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = (x - wide(mean, x)) / wide(self.root(var), x)
        return y * wide(self.weight, x) + wide(self.bias, x)

    def root(self, var: Tensor) -> Tensor:
        return (var + self.eps).sqrt()


def wide(channels: Tensor, x: Tensor) -> Tensor:
    return channels.view(-1, *[1] * (x.ndim - 2))


class WrongOutput(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 1e-3 * (x - wide(self.measure(x)[0], x)).detach() if self.training else y


class GammaTwice(ByHand):
    def normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = super().normalise(x, mean, var)
        return (y - wide(self.bias, x)) * wide(self.weight, x) + wide(self.bias, x) if self.training else y


class AbsoluteGamma(ByHand):
    """As the in-place layers that recover their input from their output have it."""

    def normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return (x - wide(mean, x)) / wide(self.root(var), x) * wide(self.weight.abs(), x) + wide(self.bias, x)


class WrongEvaluation(ByHand):
    def evaluate(self, x: Tensor) -> Tensor:
        return super().evaluate(x) + 1e-3 * wide(self.running_mean, x).tanh()


class BatchInEvaluation(ByHand):
    def evaluate(self, x: Tensor) -> Tensor:
        return self.normalise(x, *self.measure(x))


class EpsSquared(ByHand):
    def root(self, var: Tensor) -> Tensor:
        return (var + self.eps**2).sqrt()


class EpsOutside(ByHand):
    def root(self, var: Tensor) -> Tensor:
        return var.sqrt() + self.eps


class BiasedStored(ByHand):
    def stored_variance(self, var: Tensor, m: int) -> Tensor:
        return var


class MomentumReversed(ByHand):
    def weight_of_batch(self) -> float:
        weight = super().weight_of_batch()
        return weight if self.momentum is None else 1 - weight


class NoAverage(ByHand):
    def weight_of_batch(self) -> float:
        return 0.1 if self.momentum is None else self.momentum


class CountsForAverageOnly(ByHand):
    def count(self) -> None:
        if self.momentum is None:
            super().count()


class NoCounter(ByHand):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        del self.num_batches_tracked

    def count(self) -> None:
        pass


class CountsEvaluation(ByHand):
    def evaluate(self, x: Tensor) -> Tensor:
        self.count()
        return super().evaluate(x)


class MovesInEvaluation(ByHand):
    def evaluate(self, x: Tensor) -> Tensor:
        y = super().evaluate(x)
        with torch.no_grad():
            self.store(*self.measure(x), 0.1)
        return y


class OwnStatisticsAlone(ByHand):
    def evaluate(self, x: Tensor) -> Tensor:
        return self.normalise(x, *self.measure(x)) if len(x) == 1 else super().evaluate(x)


class ConstantStatistics(ByHand):
    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().measure(x.detach())


class FixedGammaInEvaluation(ByHand):
    def normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        gamma = self.weight if self.training else self.weight.detach()
        return (x - wide(mean, x)) / wide(self.root(var), x) * wide(gamma, x) + wide(self.bias, x)


class NotPersistent(ByHand):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("running_mean", torch.zeros(num_features), persistent=False)
        self.register_buffer("running_var", torch.ones(num_features), persistent=False)


class DividesByVariance(ByHand):
    def root(self, var: Tensor) -> Tensor:
        return var.sqrt() * (1 + self.eps / var).sqrt()


class OnePass(ByHand):
    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(dims)
        return mean, x.square().mean(dims) - mean.square()


class AlwaysFloat(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


class AlwaysContiguous(ByHand):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).contiguous()


class ResetsItsCounter(ByHand):
    def train(self, mode: bool = True) -> "ResetsItsCounter":
        self.num_batches_tracked.zero_()
        return super().train(mode)


class StaysInEvaluation(ByHand):
    """As frozen layers that ignore train()."""

    def train(self, mode: bool = True) -> "StaysInEvaluation":
        return super().train(False)


class SharesMean(ByHand):
    def __deepcopy__(self, memo: dict[int, Any]) -> "SharesMean":
        new = type(self)(self.num_features)
        vars(new).update({key: copy.deepcopy(value, memo) for key, value in vars(self).items() if key[0] != "_"})
        new.load_state_dict(self.state_dict())
        new._buffers["running_mean"] = self._buffers["running_mean"]
        return new


class SharesAll(ByHand):
    def __deepcopy__(self, memo: dict[int, Any]) -> "SharesAll":
        return copy.copy(self)


class Unpicklable(ByHand):
    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.activation = lambda x: x


class ForgetsMomentum(ByHand):
    def __setstate__(self, kept: dict[str, Any]) -> None:
        super().__setstate__(kept | {"momentum": 0.01})

    def __deepcopy__(self, memo: dict[int, Any]) -> "ForgetsMomentum":
        new = type(self)(self.num_features, self.eps, self.momentum).train(self.training)
        new.load_state_dict(self.state_dict())
        return new


class TakesOneValue(ByHand):
    def refuse(self, x: Tensor) -> None:
        pass


class TwoImagesAtLeast(ByHand):
    """Has an assertion of its own."""

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) > 1, "two images at least"
        return super().forward(x)


WRONG: dict[type[ByHand], str] = {
    WrongOutput: "training_output",
    GammaTwice: "training_output eps_inside_root training_gradients large_mean",
    AbsoluteGamma: "training_output evaluation_output eps_inside_root training_gradients evaluation_gradients "
    "large_mean",
    WrongEvaluation: "evaluation_output",
    BatchInEvaluation: "evaluation_output eps_inside_root each_image_alone evaluation_gradients large_mean",
    EpsSquared: "eps_inside_root",
    EpsOutside: "eps_inside_root constant_channel",
    BiasedStored: "running_statistics cumulative_average",
    MomentumReversed: "running_statistics",
    NoAverage: "cumulative_average",
    CountsForAverageOnly: "batch_count",
    NoCounter: "cumulative_average batch_count",
    CountsEvaluation: "evaluation_changes_nothing",
    MovesInEvaluation: "evaluation_changes_nothing",
    OwnStatisticsAlone: "each_image_alone",
    ConstantStatistics: "training_gradients",
    FixedGammaInEvaluation: "evaluation_gradients",
    NotPersistent: "state_dict_round_trip",
    DividesByVariance: "constant_channel",
    OnePass: "large_mean",
    AlwaysFloat: "output_dtype",
    AlwaysContiguous: "memory_format",
    ResetsItsCounter: "mode_switches",
    StaysInEvaluation: "training_output eps_inside_root running_statistics cumulative_average batch_count "
    "training_gradients large_mean mode_switches",
    SharesMean: "deep_copy",
    SharesAll: "deep_copy",
    Unpicklable: "pickling",
    ForgetsMomentum: "pickling",
    TakesOneValue: "single_value",
    TwoImagesAtLeast: "each_image_alone single_value",
}
