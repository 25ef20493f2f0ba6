import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

from bnlab.norm.model_utils import (
    FxLeaf,
    class_from,
    copy_module,
    hooked,
    layer_name,
    make_class,
    recipe_of,
    unwrap,
    unwrap_model,
)


def test_wrappers_are_unwrapped() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    assert unwrap_model(network) is network
    assert unwrap_model(nn.DataParallel(network)) is network
    assert unwrap_model(torch.compile(nn.DataParallel(network), backend="eager")) is network


def test_a_copy_has_the_values_of_computed_tensors_and_what_is_shared() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    layer.computed = layer.weight * 2
    copied = copy_module(layer, [layer.bias])
    assert torch.equal(copied.computed, layer.computed) and copied.computed is not layer.computed
    assert copied.bias is layer.bias
    assert copied.parametrizations.weight.original0 is not layer.parametrizations.weight.original0


def test_models_that_cannot_be_used() -> None:
    with pytest.raises(TypeError, match=r"must be the model, an nn.Module, not list"):
        unwrap_model([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"lazy layers .*: run it once on a batch"):
        unwrap_model(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"meta device, .*: move it and load its weights"):
        unwrap_model(nn.Linear(2, 2, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"scripted model .*: pass the model that it was made of"):
        unwrap_model(scripted)


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_are_found(register: str) -> None:
    layer = nn.Linear(2, 2)
    assert not hooked(layer)
    handle = getattr(layer, register)(lambda *_: None)
    assert hooked(layer)
    handle.remove()
    assert not hooked(layer)


class Layer(nn.Module):
    def forward(self, x: Tensor) -> str:
        return layer_name(self)


class Holder:
    """Not a module, though it has a `self`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def run(self, x: Tensor) -> str:
        return self.layer(x)


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> str:
        return Holder(self.inner).run(x)


X = torch.zeros(1)


def test_a_layer_called_by_itself_has_its_class_as_name() -> None:
    assert Layer()(X) == "Layer"
    assert layer_name(nn.BatchNorm2d(3)) == "BatchNorm2d"


def test_the_name_is_the_one_in_the_outermost_module() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(Around(Layer())))
    assert network(X) == "1.0.inner (Layer)"
    assert network[1](X) == "0.inner (Layer)"


def test_outer_modules_that_do_not_contain_the_layer_are_ignored() -> None:
    layer = Layer()

    class Elsewhere(nn.Module):
        def forward(self, x: Tensor) -> str:
            return nn.Sequential(layer)(x)

    assert Elsewhere()(X) == "0 (Layer)"


def test_a_layer_used_twice_has_its_first_name() -> None:
    layer = Layer()
    network = nn.Sequential()
    network.add_module("a", nn.Identity())
    network.add_module("b", layer)
    network.a.inner = layer
    assert network(X) == "a.inner (Layer)"


class Leaf(FxLeaf):
    def forward(self, x: Tensor, *, scale: int = 1) -> Tensor:
        return x * scale if bool(x.sum() > 0) else x  # cannot be traced


def test_leaves_are_recorded_as_one_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf = Leaf()

        def forward(self, x: Tensor) -> Tensor:
            return self.leaf(x, scale=3) + self.leaf(x=x)

    traced = fx.symbolic_trace(Model())
    assert traced(torch.ones(2)).tolist() == [4, 4]
    assert [(node.target, node.kwargs.keys()) for node in traced.graph.nodes if node.op == "call_module"] == [
        ("leaf", {"scale"}),
        ("leaf", {"x"}),
    ]


def mixed(kind: type[nn.Module]) -> type[nn.Module]:
    return make_class(f"Mixed{kind.__name__}", (kind,), kind, (mixed, kind))


def test_made_classes_are_pickled_by_how_they_are_made() -> None:
    once = mixed(nn.ReLU)
    twice = mixed(once)
    assert mixed(nn.ReLU) is once and twice.__name__ == "MixedMixedReLU" and twice.__module__ == nn.ReLU.__module__
    for kind in (once, twice):
        assert class_from(recipe_of(kind)) is kind
        layer = kind()
        for copied in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), copy.copy(layer)):
            assert type(copied) is kind and vars(copied).keys() == vars(layer).keys()
    assert recipe_of(nn.ReLU) is nn.ReLU is class_from(nn.ReLU)


def test_meta_and_wrapped_models_are_unwrapped_without_values() -> None:
    network = nn.Linear(2, 2, device="meta")
    assert unwrap(nn.DataParallel(network)) is network
