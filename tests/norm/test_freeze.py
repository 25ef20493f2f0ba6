import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import norm
from tests.norm.subclasses import (
    Activated,
    AlwaysByBatch,
    AlwaysMoving,
    Derived,
    Direct,
    Doubled,
    Foreign,
    Synchronised,
)

KINDS: list[Callable[[int], nn.Module]] = [
    *(nn.BatchNorm2d, nn.SyncBatchNorm, Derived, Activated, Doubled, Direct, Synchronised),
    lambda channels: nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
    *(norm.BatchNorm2d, norm.GhostBatchNorm2d, norm.SyncBatchNorm, norm.Whitening2d),
]


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [lambda m: m, copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved]


def images(seed: int = 0) -> Tensor:
    return torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copied", COPIES, ids=["itself", "copy", "deepcopy", "pickle", "save"])
def test_frozen_layers_normalise_by_what_they_have_stored(kind: Any, copied: Any) -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), kind(6))
    model(images(1))
    expected, keys = copy.deepcopy(model).eval()(images()), list(model.state_dict())
    done = norm.freeze(model)
    assert (done.frozen, done.kept) == (("1",), {})
    model[1] = copied(model[1])
    assert list(model.state_dict()) == keys
    before = state(model)
    for mode in (True, False, True):
        assert torch.equal(model.train(mode)(images()), expected)
        assert not model[1].training
        model[1].training = True  # by hand
        assert torch.equal(model(images()), expected)
    assert same(state(model), before)
    assert not model[1].weight.requires_grad and model[0].weight.requires_grad
    assert "frozen" in repr(model[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("modes", [(True, None), (False, None), (True, False), (False, True)])
def test_unfreezing_is_exact(kind: Any, affine: bool, modes: tuple[bool, bool | None]) -> None:
    model = nn.Sequential(kind(6)).train(modes[0])
    model[0].bias.requires_grad_(False)
    before, attributes = type(model[0]), dict(vars(model[0]))
    norm.freeze(model, affine=affine)
    assert model[0].weight.requires_grad != affine
    norm.freeze(model, affine=affine)  # twice has the same effect as once
    if modes[1] is not None:
        model.train(modes[1])
    assert norm.unfreeze(model) == ("0",)
    assert norm.unfreeze(model) == ()
    assert type(model[0]) is before and model[0].training == (modes[0] if modes[1] is None else modes[1])
    assert vars(model[0]) == attributes | {"training": model[0].training}
    assert (model[0].weight.requires_grad, model[0].bias.requires_grad) == (True, False)
    was = state(model)
    model.train()(images())
    assert not same(state(model), was)


def test_layers_within_a_layer_are_not_frozen() -> None:
    model = nn.Sequential(Activated(6, drop=0.5))
    norm.freeze(model)
    model.train()
    assert model[0].drop.training and model[0].act.weight.requires_grad
    assert (model(images()) == 0).float().mean() > 0.3
    model.eval()
    assert not model[0].drop.training


def test_what_cannot_be_frozen_is_kept_with_the_reason() -> None:
    parametrised = nn.BatchNorm2d(6)
    nn.utils.parametrize.register_parametrization(parametrised, "weight", nn.Softplus())
    model = nn.Sequential(nn.BatchNorm2d(6, track_running_stats=False), nn.InstanceNorm2d(6))
    model.extend([norm.Whitening2d(6, track_running_stats=False), AlwaysByBatch(6), AlwaysMoving(6), Foreign(6)])
    model.extend([parametrised, nn.GroupNorm(2, 6), nn.BatchNorm2d(6)])
    done = norm.freeze(model)
    none = "it keeps no running statistics"
    in_evaluation = "normalises by the batch, or moves statistics, in evaluation too"
    assert done.frozen == ("8",)
    assert done.kept == {
        **dict.fromkeys("012", none),
        "3": f"the forward of AlwaysByBatch {in_evaluation}",
        "4": f"the forward of AlwaysMoving {in_evaluation}",
        "5": "Foreign keeps statistics, but is not a subclass of torch.nn's or bnlab's layers",
        "6": "its parameters are parametrised",
    }


def test_models_that_are_refused() -> None:
    with pytest.raises(TypeError, match=r"an nn.Module, not list"):
        norm.freeze([nn.BatchNorm2d(6)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lazy layers"):
        norm.freeze(nn.LazyBatchNorm2d())


def test_a_state_dict_does_not_freeze() -> None:
    frozen, other = nn.Sequential(nn.BatchNorm2d(6)), nn.Sequential(nn.BatchNorm2d(6))
    norm.freeze(frozen)
    other.load_state_dict(frozen.state_dict(), strict=True)
    assert other[0].training and type(other[0]) is nn.BatchNorm2d
    frozen.load_state_dict(other.state_dict(), strict=True)
    assert frozen[0].frozen


def test_a_pickle_that_is_unfrozen_later() -> None:
    model = nn.Sequential(nn.BatchNorm2d(6), Activated(6))
    norm.freeze(model)
    model = pickle.loads(pickle.dumps(model))
    assert norm.unfreeze(model) == ("0", "1")
    assert [type(layer) for layer in model] == [nn.BatchNorm2d, Activated]
    assert all(p.requires_grad for p in model.parameters()) and model[0].training


def test_recalibration_skips_frozen_layers_and_folding_folds_them() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))
    norm.freeze(model)
    for mode in (True, False):
        assert norm.recalibrate(model.train(mode), [images()]).skipped == {"1": "it is frozen"}
    assert norm.fold(model, images()).folded == {"1": ("0",)}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, Activated, norm.BatchNorm2d])
def test_frozen_layers_compile(kind: Any) -> None:
    model = nn.Sequential(kind(6))
    norm.freeze(model)
    before = state(model.train())
    assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(images()), model(images()))
    assert same(state(model), before)
