"""Sound layers pass every check; of layers that get one thing wrong, exactly the checks of that thing fail."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnlab
from bnlab import norm
from bnlab.errors import UsageError
from bnlab.testing import NormLayerCheck, check_norm_layer, norm_layer_checks
from tests.norm.subclasses import Activated, Doubled
from tests.testing.layers import WRONG, ByHand, SharesAll, TakesOneValue, Unpicklable

EACH_CHECK = pytest.mark.parametrize("check", norm_layer_checks().values(), ids=norm_layer_checks())
SOUND: dict[str, Callable[[], nn.Module]] = {
    "torch 1d": lambda: nn.BatchNorm1d(5),
    "torch 2d": lambda: nn.BatchNorm2d(5),
    "torch 3d": lambda: nn.BatchNorm3d(5),
    "torch without gamma and beta": lambda: nn.BatchNorm2d(5, affine=False),
    "torch with a plain average": lambda: nn.BatchNorm2d(5, momentum=None, eps=1e-3),
    "torch of one channel": lambda: nn.BatchNorm2d(1),
    "torch 3d of one channel": lambda: nn.BatchNorm3d(1),
    "torch of many channels": lambda: nn.BatchNorm1d(512),
    "torch in float64": lambda: nn.BatchNorm2d(5).double(),
    "torch in bfloat16": lambda: nn.BatchNorm2d(5).bfloat16(),
    "torch with fixed parameters": lambda: nn.BatchNorm2d(5).requires_grad_(False),
    "1d": lambda: norm.BatchNorm1d(5),
    "2d": lambda: norm.BatchNorm2d(5),
    "3d": lambda: norm.BatchNorm3d(5),
    "without beta": lambda: norm.BatchNorm2d(5, bias=False),
    "synchronised": lambda: norm.SyncBatchNorm(5),
    "one ghost": lambda: norm.GhostBatchNorm2d(5),
    "by hand": lambda: ByHand(5),
}


@EACH_CHECK
@pytest.mark.parametrize("make", SOUND.values(), ids=SOUND)
def test_sound_layers_pass(make: Callable[[], nn.Module], check: NormLayerCheck) -> None:
    check(make())


@EACH_CHECK
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_layers_that_drop_out_and_activate_pass(drop: float, check: NormLayerCheck) -> None:
    check(Activated(5, drop=drop), activation=nn.PReLU())


@pytest.mark.parametrize("kind", WRONG, ids=lambda kind: kind.__name__)
def test_wrong_layers_fail_exactly(kind: type[ByHand]) -> None:
    failed = {}
    for name, check in norm_layer_checks().items():
        try:
            check(kind(5))
        except AssertionError as failure:
            failed[name] = str(failure)
    assert [*failed] == WRONG[kind].split(), failed
    for name, message in failed.items():
        assert message.startswith(f"{kind.__name__} fails {name}: expected "), message
        assert ", found " in message
        assert "\n" not in message
    with pytest.raises(AssertionError) as caught:
        check_norm_layer(kind(5))
    assert str(caught.value).splitlines() == [*failed.values()]
    check_norm_layer(kind(5), skip=failed)


def test_each_check_can_fail_alone() -> None:
    assert {*norm_layer_checks()} <= {*WRONG.values()}


def test_a_wrong_or_missing_activation_fails() -> None:
    with pytest.raises(AssertionError, match=r"fails training_output.*\n.*fails evaluation_output"):
        check_norm_layer(Activated(5))
    with pytest.raises(AssertionError, match="Activated fails evaluation_gradients"):
        check_norm_layer(Activated(5), activation=F.gelu)
    with pytest.raises(AssertionError, match="Doubled fails training_output"):
        check_norm_layer(Doubled(5))


def test_the_message_has_the_numbers() -> None:
    def shifted(x: Tensor) -> Tensor:
        return x + 100

    with pytest.raises(AssertionError) as caught:
        norm_layer_checks()["training_output"](nn.BatchNorm2d(5), activation=shifted)
    words = str(caught.value).split()
    expected, found = (float(words[words.index(word) + 1].rstrip(",")) for word in ("be", "found"))
    assert expected - found == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Unpicklable, TakesOneValue, SharesAll])
def test_the_layer_and_random_numbers_stay_as_they_are(kind: Callable[[int], nn.Module]) -> None:
    layer = kind(5).eval()
    layer(torch.ones(2, 5, 3, 3)).sum().backward()
    tensors = dict((*layer.named_parameters(), *layer.named_buffers()))
    before = {name: (tensor, tensor.clone(), tensor.dtype) for name, tensor in tensors.items()}
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    generators = (torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate())  # type: ignore[index]
    try:
        check_norm_layer(layer)
    except AssertionError:
        assert kind in WRONG
    after = dict((*layer.named_parameters(), *layer.named_buffers()))
    assert [*after] == [*before]
    for name, (tensor, values, dtype) in before.items():
        assert after[name] is tensor, name
        assert tensor.equal(values), name
        assert tensor.dtype == dtype, name
    for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.equal(gradient)
    assert not layer.training
    assert torch.get_rng_state().equal(generators[0])
    assert np.random.get_state()[1].tolist() == generators[1]  # type: ignore[index]
    assert random.getstate() == generators[2]


def test_skip_takes_names() -> None:
    with pytest.raises(UsageError, match=r"no check 'picklin': did you mean 'pickling'\?"):
        check_norm_layer(nn.BatchNorm2d(5), skip=["picklin"])
    check_norm_layer(Unpicklable(5), skip="pickling")


def test_what_is_no_norm_layer_is_refused() -> None:
    with pytest.raises(UsageError, match="Linear has no num_features and no eps"):
        check_norm_layer(nn.Linear(2, 2))
    with pytest.raises(UsageError, match="BatchNorm2d has no running_mean and no running_var"):
        check_norm_layer(nn.BatchNorm2d(5, track_running_stats=False))


def test_the_page_has_all_checks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "testing.md").read_text("utf-8")
    rows = [f"| `{name}` | {check.__doc__} |" for name, check in norm_layer_checks().items()]
    assert [line for line in page.splitlines() if line.startswith("| `")] == rows


def test_checks_have_descriptions() -> None:
    for name, check in bnlab.testing.norm_layer_checks().items():
        assert check.__name__ == name
        assert check.__doc__
        assert check.__doc__.endswith(".")
        assert "\n" not in check.__doc__


def test_the_table_of_checks_is_a_copy() -> None:
    norm_layer_checks().clear()
    assert len(norm_layer_checks()) > 15
