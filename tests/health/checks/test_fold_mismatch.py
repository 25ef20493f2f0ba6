import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from tests.health.checks.networks import sound_network, teacher_batches


class Doubling(nn.Module):
    """Doubles values that are tensors, which those that torch.fx traces with are not."""

    def __init__(self, by: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.by = by
        self.conv, self.bn = nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        nn.init.normal_(self.bn.bias)
        self.bn.running_mean.normal_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if isinstance(x, Tensor):
            x = x * self.by
        return self.flat(self.pool(self.bn(x)))


def test_finds_what_the_graph_does_not_show() -> None:
    model = Doubling(2).eval()
    batches = [torch.randn(8, 3, 4, 4)]
    found = health.diagnose(model, batches)["BN018"]
    assert (found.severity, found.layers) == ("error", ("bn",))
    # bn(2 c) is s (2 c - m) + b, and folded it is 2 (s (c - m) + b): they differ by b - s m in each channel
    scale = (model.bn.running_var + model.bn.eps).rsqrt()  # type: ignore[operator]
    with torch.no_grad():
        spread = model(batches[0]).std(correction=0)
        expected = (model.bn.bias - scale * model.bn.running_mean).abs().max() / spread
    assert found.numbers["difference"] == pytest.approx(float(expected), rel=1e-4)
    assert found.numbers["tolerance"] < 1e-3
    assert found.numbers["kept"] == {}


def test_is_silent_on_sound_networks() -> None:
    network = sound_network()
    report = health.diagnose(network, teacher_batches(network))
    assert "BN018" not in report
    part = report.evidence.parts["folding"]
    assert part.folded == ("1", "4")
    assert part.parity.difference < 1e-4
    assert not part.parity.changed
    assert "BN018" not in health.diagnose(Doubling(1).eval(), [torch.randn(16, 3, 4, 4)])


def test_is_silent_where_rounding_explains_the_difference() -> None:
    network = sound_network().bfloat16()
    report = health.diagnose(network, [(x.bfloat16(), y) for x, y in teacher_batches(sound_network())])
    assert report.evidence.parts["folding"].parity.difference > 1e-4
    assert "BN018" not in report


def test_layers_that_cannot_be_folded_are_no_finding() -> None:
    network = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU()).eval()
    report = health.diagnose(network, [torch.randn(16, 3, 4, 4)])
    assert "BN018" not in report
    assert "BN018" in report.skipped
