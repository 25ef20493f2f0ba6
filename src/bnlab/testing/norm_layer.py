"""Checks that a layer is batch normalisation: one function each, which compares it with the slow float64 reference.

>>> import pytest, torch, bnlab
>>> @pytest.mark.parametrize("check", bnlab.testing.norm_layer_checks().values(), ids=bnlab.testing.norm_layer_checks())
... def test_my_layer(check):
...     check(torch.nn.BatchNorm2d(8))
"""

import copy
import pickle
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.errors import UsageError, did_you_mean
from bnlab.health.restore import restored
from bnlab.testing.probe import (
    BATCHES,
    Activation,
    CheckError,
    Probe,
    assert_finite,
    assert_unchanged,
    random_values,
    require,
    state,
)

_FAR = 1e4  # standard deviations from 0: float32 has three digits left, and E[x^2] - E[x]^2 has none


class NormLayerCheck(Protocol):
    """A check of a layer: returns nothing, or raises an AssertionError of one sentence."""

    __name__: str
    __doc__: str | None

    def __call__(
        self, layer: nn.Module, *, shape: tuple[int, ...] | None = None, activation: Activation | None = None
    ) -> None: ...


_CHECKS: dict[str, NormLayerCheck] = {}


def norm_layer_checks() -> dict[str, NormLayerCheck]:
    """The checks of `check_norm_layer` by name, in its order, to parametrise a test with."""
    return dict(_CHECKS)


def check_norm_layer(
    layer: nn.Module,
    *,
    shape: tuple[int, ...] | None = None,
    activation: Activation | None = None,
    skip: Iterable[str] = (),
) -> None:
    """Assert that a layer is batch normalisation as torch.nn's layers are, in every convention.

    The layer and the generators of random numbers stay as they are.

    >>> bnlab.testing.check_norm_layer(torch.nn.BatchNorm2d(8))

    Args:
        layer: a layer with num_features, eps, momentum and the buffers running_mean and running_var. Its parameters, if
            it has any, are weight (gamma) and bias (beta).
        shape: of the input, N x C x ... with at least two images (default: N x C for BatchNorm1d, N x C x H x W and
            N x C x D x H x W for 2d and 3d; for another class the first of 4, 2, 3 and 5 dimensions that it runs on).
        activation: what the layer applies to the normalised values; a function or a module.
        skip: names of checks not to make.

    Raises:
        AssertionError: checks failed; a sentence for each says what was expected and what was found.
        UsageError: this is no layer with running statistics, the shape does not fit it, or no check is called so.
    """
    skipped = {skip} if isinstance(skip, str) else {*skip}
    for name in skipped - _CHECKS.keys():
        raise UsageError(f"there is no check '{name}'", did_you_mean(name, [*_CHECKS]))
    failures = []
    for name, check in _CHECKS.items():
        if name not in skipped:
            try:
                check(layer, shape=shape, activation=activation)
            except AssertionError as failure:
                failures.append(failure)
    if failures:
        raise AssertionError("\n".join(map(str, failures))) from failures[0]


def _check(run: Callable[[Probe], None]) -> NormLayerCheck:
    """Make a check of a function, which asserts of a probe."""

    def check(layer: nn.Module, *, shape: tuple[int, ...] | None = None, activation: Activation | None = None) -> None:
        with restored(layer, parameters=True):  # copies of a class with a __deepcopy__ may share its tensors
            probe = Probe(layer, shape, activation)
            try:
                run(probe)
            except CheckError as failure:
                raise AssertionError(f"{probe.kind} fails {run.__name__}: {failure}") from None
            except Exception as error:  # of any type: it is the caller's own code
                first = f"{type(error).__name__}: {error}".partition("\n")[0]
                raise AssertionError(
                    f"{probe.kind} fails {run.__name__}: expected no error with an input of shape {[*probe.shape]}, "
                    f"found {first}"
                ) from error

    check.__name__, check.__doc__, check.__qualname__ = run.__name__, run.__doc__, run.__name__
    _CHECKS[run.__name__] = check
    return check


@_check
def training_output(probe: Probe) -> None:
    """In training, y = (x - mean) / sqrt(var + eps) * gamma + beta, by the batch's mean and biased variance."""
    probe.compare_output(training=True, what="the output in training")


@_check
def evaluation_output(probe: Probe) -> None:
    """In evaluation, y follows from the running statistics alone."""
    probe.compare_output(training=False, what="the output in evaluation")


@_check
def eps_inside_root(probe: Probe) -> None:
    """eps is added to the variance, under the root, which shows where the variance is about eps."""
    scale = max(float(probe.layer.eps), 1e-12) ** 0.5  # type: ignore[arg-type]
    for training, mode in ((True, "training"), (False, "evaluation")):
        probe.compare_output(training=training, scale=scale, what=f"the output in {mode} where var is about eps")


@_check
def running_statistics(probe: Probe) -> None:
    """Each batch moves the running statistics to (1 - momentum) old + momentum new, with the unbiased variance."""
    layer = probe.copy(training=True)
    layer.momentum = 0.1 if layer.momentum is None else layer.momentum
    probe.compare_update(layer, 2, "(each weighs momentum, with its unbiased variance)")


@_check
def cumulative_average(probe: Probe) -> None:
    """With momentum=None, the running statistics are the plain average over all batches."""
    layer = probe.copy(training=True)
    layer.momentum = None
    _counter(layer).zero_()
    probe.compare_update(layer, 3, "(their plain average, since momentum is None)")


@_check
def batch_count(probe: Probe) -> None:
    """Each batch in training adds 1 to num_batches_tracked."""
    layer = probe.copy(training=True)
    layer(probe.input())
    found = _counter(layer)
    require(int(found) == BATCHES + 1, f"num_batches_tracked to be {BATCHES + 1}", str(int(found)))


def _counter(layer: Any) -> Tensor:
    found = getattr(layer, "num_batches_tracked", None)
    require(isinstance(found, Tensor), "a buffer num_batches_tracked", "none")
    assert isinstance(found, Tensor)
    return found


@_check
def evaluation_changes_nothing(probe: Probe) -> None:
    """A forward in evaluation changes no parameter and no buffer."""
    layer = probe.copy(training=False)
    before = state(layer)
    layer(probe.input())
    assert_unchanged(before, layer, "a forward in evaluation")


@_check
def each_image_alone(probe: Probe) -> None:
    """In evaluation, an image has the same output alone as in a batch."""
    x = probe.input()
    alone = torch.cat([probe.copy(training=False)(image) for image in torch.split(x, 1)])
    probe.close(alone, probe.copy(training=False)(x), "the output of an image alone in evaluation")


@_check
def training_gradients(probe: Probe) -> None:
    """In training, gradients of input, gamma and beta go through the batch's mean and variance too."""
    probe.compare_gradients(training=True)


@_check
def evaluation_gradients(probe: Probe) -> None:
    """In evaluation, the gradients are those of a linear function."""
    probe.compare_gradients(training=False)


@_check
def state_dict_round_trip(probe: Probe) -> None:
    """A layer with other values that loads the state_dict has the same output in evaluation."""
    layer, fresh = probe.copy(training=False), probe.copy(training=False)
    with torch.no_grad():
        for tensor in (*fresh.parameters(), *fresh.buffers()):
            tensor.fill_(1)
    fresh.load_state_dict(layer.state_dict())
    x = probe.input()
    probe.close(fresh(x), layer(x), "the output after loading the state_dict")


@_check
def constant_channel(probe: Probe) -> None:
    """A channel of equal values gives finite outputs, gradients and statistics."""
    layer, x = probe.copy(training=True), probe.input()
    x[:, 0] = 3
    y = layer(x.requires_grad_(True))
    y.backward(random_values(1, *y.shape).to(y))
    assert_finite(y, "the output where a channel is constant")
    assert_finite(x.grad, "the gradient of the input where a channel is constant")
    for name, tensor in state(layer).items():
        assert_finite(tensor, f"{name} after a batch where a channel is constant")
    for name, parameter in layer.named_parameters():
        assert_finite(parameter.grad, f"the gradient of {name} where a channel is constant")


@_check
def large_mean(probe: Probe) -> None:
    """Where the mean is 10,000 standard deviations from 0, no more is lost to rounding than in torch.nn's layers."""
    x = probe.input(mean=2 * _FAR)
    for training, mode in ((True, "training"), (False, "evaluation")):
        layer = probe.copy(training=training, mean=2 * _FAR)
        expected, leaves = probe.reference(layer, x, training=training)
        gamma, beta = (leaf.detach().to(x) for leaf in leaves[1:])
        running = (layer.running_mean.clone(), layer.running_var.clone())
        theirs = F.batch_norm(x, *running, gamma, beta, training, 0.0, layer.eps).double().cpu()
        lost = float((theirs - expected.detach()).abs().max() / expected.detach().abs().max())
        allowed = max(4 * lost, 8 * torch.finfo(x.dtype).eps * _FAR)  # 8 units in the last place of such values
        what = f"the output in {mode} where the mean is {_FAR:.0f} standard deviations from 0"
        probe.close(layer(x), probe.activation(expected), what, allowed)


@_check
def output_dtype(probe: Probe) -> None:
    """The output has the dtype of the layer and its input: float32, float64 and bfloat16."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        if dtype == torch.float64 and probe.device.type == "mps":
            continue
        for training in (True, False):
            y = probe.copy(training=training).to(dtype)(probe.input().to(dtype))
            require(y.dtype == dtype, f"an output of {dtype}", str(y.dtype))


@_check
def memory_format(probe: Probe) -> None:
    """The output has the memory format of the input, contiguous or channels_last, and the same values."""
    formats = [torch.contiguous_format, *[torch.channels_last] * (len(probe.shape) == 4)]
    for training in (True, False):
        expected = probe.copy(training=training)(probe.input().contiguous())
        for layout in formats:
            y = probe.copy(training=training)(probe.input().contiguous(memory_format=layout))
            require(y.is_contiguous(memory_format=layout), f"an output in {layout}", f"the strides {y.stride()}")
            probe.close(y, expected, f"the output in {layout}")


@_check
def mode_switches(probe: Probe) -> None:
    """train() and eval() set the mode of every module within, and change nothing else."""
    layer = probe.copy(training=True)
    before, numbers = state(layer), (layer.eps, layer.momentum)
    for training in (False, True, False):
        returned = layer.train(training)
        require(returned is layer, "train() to return the layer", type(returned).__name__)
        modes = [module.training for module in layer.modules()]
        require({*modes} == {training}, f"train({training}) to set every module's mode", f"{modes}")
        assert_unchanged(before, layer, "a switch of the mode")
        found = (layer.eps, layer.momentum)
        require(found == numbers, f"eps and momentum to stay {numbers}", f"{found}")


def _check_copy(probe: Probe, copied: Callable[[Any], Any], how: str) -> None:
    for training in (True, False):
        layer = probe.copy(training=training)
        before, x = state(layer), probe.input()
        other = copied(layer)
        require(type(other) is type(layer), f"{how} to keep the class", type(other).__name__)
        assert_unchanged(before, other, how)
        for name in ("training", "eps", "momentum"):
            one, two = getattr(layer, name), getattr(other, name)
            require(one == two, f"{how} to keep {name}={one}", f"{two}")
        y = other(x)
        assert_unchanged(before, layer, f"a forward of what {how} made")
        probe.close(y, layer(x), f"the output after {how}")


@_check
def deep_copy(probe: Probe) -> None:
    """copy.deepcopy keeps parameters, buffers, mode and numbers, and shares no tensor with the layer."""
    _check_copy(probe, copy.deepcopy, "copy.deepcopy")


@_check
def pickling(probe: Probe) -> None:
    """pickle keeps parameters, buffers, mode and numbers."""
    _check_copy(probe, lambda layer: pickle.loads(pickle.dumps(layer)), "pickle")


@_check
def single_value(probe: Probe) -> None:
    """A batch of one value a channel raises a ValueError or gives finite values, and leaves the statistics finite."""
    layer = probe.copy(training=True)
    x = probe.input()[(slice(1), slice(None), *[slice(1)] * (len(probe.shape) - 2))]  # 1 x C x 1 ...
    try:
        y = layer(x)
    except ValueError:
        y = None
    assert_finite(y, "the output of a batch of one value a channel")
    for name, tensor in layer.named_buffers():
        assert_finite(tensor, f"{name} after a batch of one value a channel")
