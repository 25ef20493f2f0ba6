"""What one forward shows of how a network uses its layers."""

import pytest
from torch import nn

from tests.health.gather.networks import DropPath, Net, traced


@pytest.mark.parametrize("between", [nn.Identity(), nn.Dropout2d(), DropPath(), nn.Flatten(0, 0)])
def test_what_returns_its_input_does_not_come_before_a_layer(between: nn.Module) -> None:
    found = traced(nn.Sequential(nn.Conv2d(3, 3, 1), between, nn.BatchNorm2d(3)))
    assert found.used["2"].before == "0"
    assert found.reads["0"] == 1


def test_flattened_values_come_from_the_layer_that_made_them() -> None:
    network = nn.Sequential(nn.Conv2d(3, 2, 6), nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert traced(network).used["2"].before == "0"


def test_residual_adds_and_branches_count_as_reads() -> None:
    network = Net(
        lambda net, x: net.bn2(net.conv(x)) + net.bn(x),
        bn=nn.BatchNorm2d(3),
        conv=nn.Conv2d(3, 3, 1),
        bn2=nn.BatchNorm2d(3),
    )
    found = traced(network)
    assert found.used["bn2"].before == "conv"
    assert found.used["bn"].before is None  # the input of the network
    assert (found.reads["bn"], found.reads["conv"]) == (1, 1)
    assert [*found.used] == ["bn2", "bn"]  # in the order of the calls


def test_a_shared_layer_is_called_twice() -> None:
    network = Net(lambda net, x: net.bn(net.conv(net.bn(x))), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    found = traced(network)
    assert found.used["bn"].calls == 2
    assert found.used["bn"].shape == (4, 3, 6, 6)


def test_hooks_of_the_model_are_run_and_seen() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
    calls: list[str] = []
    network[0].register_forward_hook(lambda *_: calls.append("0"))
    network[1].register_forward_hook(lambda module, args, output: output * 2)  # so ReLU does not read the layer's
    found = traced(network)
    assert calls == ["0"]
    assert found.used["1"].before == "0"
    assert [len(module._forward_hooks) for module in network] == [1, 1, 0]
    assert not nn.modules.module._global_forward_hooks


def test_layers_that_are_never_reached_are_not_used() -> None:
    network = Net(lambda net, x: net.conv(x), bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 3, 1))
    assert traced(network).used == {}
