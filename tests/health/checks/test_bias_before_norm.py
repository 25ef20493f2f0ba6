"""A bias that the normalisation subtracts is found, and one that has an effect is not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health
from bnlab.norm.freeze import freeze
from bnlab.norm.recalibrate import recalibrate
from tests.health.checks.named_networks import images, sound_network, teacher_batches


def found(model: nn.Module, batches: list[Tensor] | None = None) -> list[health.Finding]:
    return [*health.diagnose(model, batches or images(64, 32), select=["BN013"]).findings]


def test_finds_a_dead_bias() -> None:
    network = sound_network(bias=True)
    finding = health.diagnose(network, teacher_batches(network))["BN013"]
    assert set(finding.layers) == {"bn1", "bn2"}
    assert (finding.severity, finding.safety) == ("info", "safe")
    assert finding.numbers["parameters"] == 8 + 16
    assert finding.numbers["before"] == {"bn1": "conv1", "bn2": "conv2"}


def test_the_command_keeps_the_outputs() -> None:
    network = sound_network(bias=True)
    x = images(32, 32)[0]
    before = network(x)
    exec(found(network)[0].command, {"model": network})
    exec(found(network)[0].command, {"model": network})
    assert network.conv1.bias is None and network.conv2.bias is None
    torch.testing.assert_close(network(x), before)
    assert not found(network)


@pytest.mark.parametrize(("factor", "severity"), [(20.0, "info"), (50.0, "warn")])
def test_a_bias_that_drifted_is_a_warning(factor: float, severity: str) -> None:
    network = sound_network(bias=True)
    variance = network.bn2.running_var
    assert isinstance(network.conv2, nn.Conv2d) and isinstance(variance, Tensor)
    assert network.conv2.bias is not None
    network.conv2.bias.data = factor * variance.sqrt()
    recalibrate(network, images(256, 32, seed=3))
    finding = found(network, images(256, 32))[0]
    assert finding.severity == severity
    assert finding.layers[0] == "bn2"
    assert finding.numbers["largest"] == pytest.approx(factor, rel=0.2)
    assert finding.numbers["drifted"] == (["bn2"] if severity == "warn" else [])


def test_a_bias_of_the_size_of_the_weights_has_not_drifted() -> None:
    """It is far above the standard deviation, since the inputs hardly vary."""
    network = sound_network(bias=True)
    assert isinstance(network.conv1, nn.Conv2d) and network.conv1.bias is not None
    network.conv1.bias.data[:] = 0.1
    finding = found(network, [x / 1000 for x in images(256, 32)])[0]
    layer = network.bn1
    assert isinstance(layer, nn.BatchNorm2d)
    layer.eps = 1e-12
    finding = found(network, [x / 1000 for x in images(256, 32)])[0]
    assert finding.numbers["largest"] > 32
    assert finding.severity == "info"


def test_is_silent_without_a_bias() -> None:
    assert "BN013" not in health.diagnose(sound_network(), images(64, 32))
    network = sound_network(bias=True)
    for layer in (network.conv1, network.conv2):
        nn.init.zeros_(layer.bias)
    assert found(network) == []


def test_is_silent_where_layers_are_frozen() -> None:
    network = sound_network(bias=True)
    freeze(network)
    assert not found(network)


class Net(nn.Module):
    """Calls a function with its layers."""

    def __init__(self, run: "Callable[[Net, Tensor], Tensor]") -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(8, 4)
        self.square = nn.Linear(8, 3)
        self.drop = nn.Dropout2d(0.5)
        self.bn = nn.BatchNorm2d(4)
        self.tokens = nn.BatchNorm1d(4)
        self.rows = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@pytest.mark.parametrize(
    ("run", "has_bias"),
    [
        pytest.param(lambda net, x: net.bn(net.conv(x)), True, id="directly"),
        pytest.param(lambda net, x: net.tokens(net.linear(x[:, 0]).transpose(1, 2)), True, id="transposed"),
        # 3 rows of 3 values each: the bias belongs to the values, the normalisation to the rows
        pytest.param(lambda net, x: net.rows(net.square(x[:, 0, :3])), False, id="other channels"),
        pytest.param(lambda net, x: net.bn(net.drop(net.conv(x))), False, id="dropout"),
        pytest.param(
            lambda net, x: net.bn(F.dropout(net.conv(x), 0.5, net.training)), False, id="dropout by a function"
        ),
        pytest.param(lambda net, x: net.bn(y := net.conv(x)) + y, False, id="read by another"),
        pytest.param(lambda net, x: net.bn(net.bn(net.conv(x))), False, id="a layer that is used twice"),
        pytest.param(lambda net, x: net.bn(net.conv(x).relu()), False, id="an activation between"),
    ],
)
def test_what_is_between_decides(run: Callable[[Net, Tensor], Tensor], has_bias: bool) -> None:
    assert bool(found(Net(run).eval())) == has_bias
