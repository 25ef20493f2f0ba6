"""InstanceNorm with tracking, what it costs, and its sound twin."""

from functools import partial

import torch
from torch import Tensor, nn

from bnlab import health
from tests.health.checks.named_networks import images, small_network

Tracking = partial(nn.InstanceNorm2d, affine=True, track_running_stats=True)


def contrasts(n: int = 256) -> list[Tensor]:
    """Images of very different contrast."""
    generator = torch.Generator().manual_seed(3)
    return [x * torch.rand(len(x), 1, 1, 1, generator=generator) * 10 for x in images(n, 32)]


@torch.no_grad()
def labelled(network: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The classes are those of the training mode, in which each image is normalised by itself."""
    batches = contrasts()
    network.train()
    labels = [network(x).argmax(1) for x in batches]
    network.eval()
    return list(zip(batches, labels, strict=True))


def test_finds_tracking_and_what_it_costs() -> None:
    network = small_network(norm=Tracking)
    report = health.diagnose(network, labelled(network))
    finding = report["BN024"]
    assert (finding.severity, set(finding.layers)) == ("error", {"bn1", "bn2"})
    assert finding.cost is not None
    assert finding.cost.after == 1 == report.accuracy["batch"]
    assert finding.cost.before < 0.9


def test_without_a_cost_it_is_a_warning() -> None:
    finding = health.diagnose(small_network(norm=Tracking), contrasts())["BN024"]
    assert (finding.severity, finding.cost) == ("warn", None)


def test_beside_batch_norm_the_cost_is_not_known() -> None:
    network = small_network(norm=Tracking)
    network.bn2 = nn.BatchNorm2d(16)
    finding = health.diagnose(network, labelled(network))["BN024"]
    assert (finding.severity, finding.layers, finding.cost) == ("warn", ("bn1",), None)


def test_the_command_normalises_each_image_by_itself() -> None:
    model = small_network(norm=Tracking)
    batches = labelled(model)
    exec(health.diagnose(model, batches)["BN024"].command, {"model": model, "torch": torch})
    with torch.no_grad():
        assert all((model(x).argmax(1) == y).all() for x, y in batches)
    assert "BN024" not in health.diagnose(model, batches)


def test_is_silent_without_tracking() -> None:
    network = small_network(norm=partial(nn.InstanceNorm2d, affine=True))
    assert "BN024" not in health.diagnose(network, labelled(network))
    assert "BN024" not in health.diagnose(small_network(), images(64, 32))
