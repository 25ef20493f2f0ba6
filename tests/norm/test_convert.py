"""Conversion in place and back; two processes are in test_sync.py."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import norm
from bnlab.norm.convert import BatchNormAnyDims
from bnlab.norm.layers import BatchNorm
from tests.norm.subclasses import CONVERTIBLE, REASONS, Activated, AnyShape, Derived, Doubled, Synchronised

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "average": {"momentum": None},
    "not tracked": {"track_running_stats": False},
    "not affine": {"affine": False},
}
WAYS = pytest.mark.parametrize(
    ("change", "undo"), [(norm.convert, norm.revert), (norm.convert_sync, norm.revert_sync)], ids=["convert", "sync"]
)


def run(layer: nn.Module, steps: int = 2) -> list[Tensor]:
    """Outputs, gradients and buffers of some steps of a copy."""
    layer = copy.deepcopy(layer)
    found: list[Tensor] = []
    for seed in range(steps):
        x = torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(seed)).requires_grad_()
        torch.manual_seed(seed)
        y = layer(x)
        layer.zero_grad()
        y.square().sum().backward()
        found += [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]
    return [*found, *layer.buffers()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return len(ones) == len(others) and all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def identities(model: nn.Module) -> dict[str, int]:
    return {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}


def _hook(*_: Any) -> None:
    pass


@WAYS
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", CONVERTIBLE, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("training", [True, False])
def test_conversion_changes_no_result_and_back_is_exact(
    kind: type[nn.Module], option: str, training: bool, change: Any, undo: Any
) -> None:
    model = nn.Sequential(kind(5, **OPTIONS[option])).train(training)
    model[0].register_forward_hook(_hook)
    before, tensors, attributes = run(model), identities(model), dict(vars(model[0]))
    done = change(model)
    assert done.model is model and (done.converted, done.kept) == (("0",), {})
    assert isinstance(model[0], norm.SyncBatchNorm if change is norm.convert_sync else BatchNorm)
    assert isinstance(model[0], kind) or kind in (nn.BatchNorm2d, nn.SyncBatchNorm)
    assert same(run(model), before) and identities(model) == tensors
    pickled = pickle.loads(pickle.dumps(model))
    assert type(pickled[0]) is type(model[0]) and same(run(pickled), before)
    assert change(model).converted == ("0",)  # as it should be already
    for converted in (model, pickled):
        assert undo(converted).converted == ("0",)
        assert type(converted[0]) is kind and vars(converted[0]).keys() == attributes.keys()
        assert same(run(converted), before)
    assert vars(model[0]) == attributes and identities(model) == tensors


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Derived, Activated, Doubled, AnyShape])
def test_both_conversions_are_undone_one_after_the_other(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(5))
    before = run(model)
    norm.convert(model)
    ours = type(model[0])
    norm.convert_sync(model)
    assert same(run(model), before)
    model = pickle.loads(pickle.dumps(model))
    assert norm.revert(model).kept == {"0": "convert_sync has converted it: call revert_sync first"}
    assert norm.revert_sync(model).converted == ("0",) and type(model[0]) is ours
    assert norm.revert(model).converted == ("0",) and type(model[0]) is kind


@WAYS
@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_what_cannot_be_converted_is_kept_with_the_reason(kind: type[nn.Module], change: Any, undo: Any) -> None:
    model = nn.Sequential(kind(5))
    generator = torch.get_rng_state()
    done = change(model)
    assert (done.converted, done.kept) == ((), {"0": REASONS[kind]})
    assert type(model[0]) is kind and torch.equal(torch.get_rng_state(), generator)
    assert not undo(model).converted


def test_other_reasons() -> None:
    replaced, parametrised = nn.BatchNorm2d(5), nn.BatchNorm2d(5)
    replaced.forward = lambda input: input  # type: ignore[method-assign]
    nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Softplus())
    model = nn.Sequential(replaced, parametrised, nn.InstanceNorm2d(5, track_running_stats=True), nn.GroupNorm(1, 5))
    model.extend([norm.GhostBatchNorm2d(5), norm.Whitening2d(5), norm.BatchNorm2d(5), norm.SyncBatchNorm(5)])
    reasons = {"0": "its forward was replaced", "1": "its parameters are parametrised"}
    assert norm.convert(model).kept == reasons
    done = norm.convert_sync(model)
    assert done.converted == ("6", "7")
    kinds = {name: f"{kind} cannot be synchronised" for name, kind in [("4", "GhostBatchNorm2d"), ("5", "Whitening2d")]}
    assert done.kept == reasons | kinds
    assert norm.revert_sync(model).kept == {"7": "it was made as a SyncBatchNorm, not converted"}
    model[6].statistics = "population"
    made = dict.fromkeys("467", "it was made as bnlab's layer, not converted")
    assert norm.revert(model).kept == made


def test_what_torchs_layers_cannot_do_is_not_reverted() -> None:
    model = norm.convert(nn.Sequential(nn.BatchNorm2d(5), nn.BatchNorm2d(5))).model
    model[0].statistics, model[1].example_weight = "population", 0.1
    reason = "torch.nn's layers normalise by running statistics alone in inference"
    assert norm.revert(model).kept == dict.fromkeys("01", reason)
    model[0].statistics, model[1].example_weight = "running", 0.0
    assert norm.revert(model).converted == ("0", "1")
    assert vars(model[0]).keys() == vars(nn.BatchNorm2d(5)).keys()


@WAYS
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Activated, Synchronised, norm.BatchNorm2d])
def test_a_frozen_layer_stays_frozen(kind: type[nn.Module], change: Any, undo: Any) -> None:
    model = nn.Sequential(kind(5))
    model(torch.randn(4, 5, 3, 3))
    assert norm.freeze(model).frozen == ("0",)
    before = run(model)
    for step in (change, undo):
        step(model)
        model = pickle.loads(pickle.dumps(model)).train()
        model[0].training = True  # by hand
        assert same(run(model), before)
    assert norm.unfreeze(model) == ("0",)
    assert type(model[0]) is kind and model[0].training and model[0].weight.requires_grad
    assert not same(run(model), before)


@WAYS
def test_a_model_that_is_the_layer_and_shared_layers(change: Any, undo: Any) -> None:
    layer = nn.BatchNorm2d(5)
    assert change(layer).model is layer and change(layer).converted == ("",)
    assert undo(layer).converted == ("",) and type(layer) is nn.BatchNorm2d
    model = nn.Sequential(layer, nn.Sequential(layer))
    assert change(nn.DataParallel(model)).converted == ("0",)
    assert model[0] is model[1][0]


@pytest.mark.parametrize("step", [norm.convert, norm.revert, norm.convert_sync, norm.revert_sync])
def test_models_that_are_refused(step: Any) -> None:
    with pytest.raises(TypeError, match=r"an nn.Module, not list"):
        step([nn.BatchNorm2d(5)])
    with pytest.raises(ValueError, match="lazy layers"):
        step(nn.LazyBatchNorm2d())


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, Synchronised])
def test_what_torch_has_synchronised_is_reverted(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(5))
    model[0].register_forward_hook(_hook)
    before, tensors = run(model), identities(model)
    norm.freeze(model)
    assert norm.revert_sync(model).converted == ("0",)
    assert norm.unfreeze(model) == ("0",)
    assert isinstance(model[0], BatchNormAnyDims if kind is nn.SyncBatchNorm else Synchronised)
    assert not norm.revert_sync(model).converted  # there is nothing left to do
    assert identities(model) == tensors and len(model[0]._forward_hooks) == 1
    assert "process_group" not in vars(model[0])
    for copied in (model, pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert same(run(copied), before)
    reverted = type(model[0])
    assert norm.convert_sync(model).converted == ("0",) and same(run(model), before)
    norm.revert_sync(model)
    assert type(model[0]) is reverted
    for shape in ((4, 5), (4, 5, 2), (2, 5, 2, 2, 2)):
        assert model(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="expected at least 2D input"):
        BatchNormAnyDims(5)(torch.zeros(5))


def test_process_groups() -> None:
    first, second = object(), object()
    layer = nn.SyncBatchNorm(2, process_group=first)
    norm.convert_sync(layer)
    assert layer.process_group is first
    norm.convert_sync(layer, second)
    assert layer.process_group is second
    norm.revert_sync(layer)
    assert type(layer) is nn.SyncBatchNorm and layer.process_group is first


def test_a_class_that_cannot_be_mixed() -> None:
    class Sealed(nn.BatchNorm2d):
        def __init_subclass__(cls) -> None:
            raise TypeError("no subclasses")

    assert norm.convert(Sealed(3)).kept == {"": "its class cannot be changed: no subclasses"}


def test_bnlabs_layers_do_what_torchs_lack() -> None:
    model = nn.Sequential(nn.BatchNorm2d(5), Activated(5), Doubled(5))
    norm.convert(model)
    model(torch.full((4, 5, 3, 3), torch.nan))
    for layer in model:
        assert layer.num_batches_tracked == 0 and layer.running_mean.abs().sum() == 0
        with pytest.raises(ValueError, match=r"is for 5 channels, and got 4: \[2, 4, 3, 3\]"):
            layer(torch.zeros(2, 4, 3, 3))
        with pytest.raises(norm.TooFewValuesError):
            layer(torch.zeros(1, 5, 1, 1))
        layer.statistics = "population"
        with pytest.raises(ValueError, match="no population statistics"):
            layer.eval()(torch.zeros(2, 5, 3, 3))
        assert layer.train()(torch.zeros(0, 5, 3, 3)).shape == (0, 5, 3, 3)
    done = norm.recalibrate(model, [torch.randn(8, 5, 3, 3)])
    assert list(done.layers) == ["0", "1", "2"]
    assert model.eval()(torch.randn(2, 5, 3, 3)).shape == (2, 5, 3, 3)
    assert norm.fold(nn.Sequential(nn.Conv2d(5, 5, 1), model[0])).folded
