import torch
from torch import Tensor, nn

from bnlab.norm.naming import name_of


class Layer(nn.Module):
    def forward(self, x: Tensor) -> str:
        return name_of(self)


class Holder:
    """Not a module, though it has a `self`."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def run(self, x: Tensor) -> str:
        return self.layer(x)


class Around(nn.Module):
    def __init__(self, held: nn.Module) -> None:
        super().__init__()
        self.held = held

    def forward(self, x: Tensor) -> str:
        return Holder(self.held).run(x)


X = torch.zeros(1)


def test_a_layer_by_itself_is_its_kind() -> None:
    assert Layer()(X) == "Layer"
    assert name_of(nn.BatchNorm2d(3)) == "BatchNorm2d"


def test_the_name_is_that_in_the_outermost_module() -> None:
    network = nn.Sequential(nn.Identity(), nn.Sequential(Around(Layer())))
    assert network(X) == "1.0.held (Layer)"
    assert network[1](X) == "0.held (Layer)"


def test_modules_further_out_that_do_not_hold_it_are_passed_over() -> None:
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
