"""momentum=None over a training, and where it is right."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from bnlab import health
from tests.health.checks.named_networks import images, small_network, sound_network, teacher_batches


def averaged(network: nn.Sequential, batches: int = 120, *, drift: bool = True) -> nn.Sequential:
    """The network after a training at momentum=None in which the scale of its weights falls to a third."""
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    final = {conv: conv.weight.detach().clone() for conv in network.modules() if isinstance(conv, nn.Conv2d)}
    network.train()
    with torch.no_grad():
        for i, x in enumerate(images(16 * batches, 16, seed=11)):
            for conv, weight in final.items():
                conv.weight.copy_(weight * (1 + 2 * (1 - i / (batches - 1)) if drift else 1))
            network(x)
    return network.eval()


def test_finds_an_average_over_a_training() -> None:
    teacher = sound_network()
    finding = health.diagnose(averaged(teacher), teacher_batches(teacher))["BN028"]
    assert (finding.severity, set(finding.layers)) == ("warn", {"bn1", "bn2"})
    assert finding.numbers == {"off_share": 1, "updates": 120}
    assert finding.cost is not None and finding.cost.matters


def test_is_silent_where_the_weights_were_fixed() -> None:
    teacher = sound_network()
    assert "BN028" not in health.diagnose(averaged(teacher, drift=False), teacher_batches(teacher))


def test_is_silent_after_update_bn() -> None:
    network = small_network()
    update_bn(images(320, 32, seed=4), network)
    report = health.diagnose(network, teacher_batches(network), optimizer=torch.optim.SGD(network.parameters(), lr=0.1))
    assert "BN028" not in report


@pytest.mark.parametrize(("batches", "found"), [(99, False), (100, True)])
def test_is_silent_after_few_batches(batches: int, found: bool) -> None:
    report = health.diagnose(averaged(sound_network(), batches), images(128, 32), select=["BN028"])
    assert bool(report.findings) == found


def test_advises_where_the_training_goes_on() -> None:
    model = averaged(sound_network(), drift=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (finding,) = health.diagnose(model, images(128, 32), optimizer=optimizer, select=["BN028"]).findings
    assert (finding.severity, finding.safety) == ("info", "unsafe")
    exec(finding.command, {"model": model})
    assert not health.diagnose(model, images(128, 32), optimizer=optimizer, select=["BN028"]).findings
