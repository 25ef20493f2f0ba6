import pytest
import torch
from torch import nn

from bnlab import health, norm
from tests.health.checks.photos import batches, normalised, photos, small_network, trained_on

ID = "BN026"


def small_variances(eps: float) -> nn.Sequential:
    """Inputs of the layers with a standard deviation of about 0.03, so that 1e-3 matters and 1e-5 does not."""
    network = small_network()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data *= 0.05
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
    norm.recalibrate(network, list(normalised(photos(512)).split(64)), layer_by_layer=True)
    return network


def set_eps(network: nn.Module, eps: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps


def test_finds_the_eps_of_tensorflow() -> None:
    network = small_variances(1e-3)
    set_eps(network, 1e-5)
    report = health.diagnose(network, batches(normalised(photos(256, seed=1))), select=[ID])
    finding = report[ID]
    assert finding.severity == "warn" and finding.layers == ("1", "4", "7", "10")
    assert finding.numbers["expected"] == 1e-3 and finding.numbers["like"] == [1e-3]
    assert finding.numbers["expected_distance"] < 0.1
    assert all(m.eps == 1e-5 for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_is_silent_about_the_eps_of_the_training(eps: float) -> None:
    report = health.diagnose(small_variances(eps), batches(normalised(photos(256, seed=1))), select=[ID])
    assert not report.findings and report.evidence.has("eps")


def test_is_silent_about_an_eps_that_changes_nothing() -> None:
    network = trained_on(normalised(photos(256)))
    set_eps(network, 1e-8)
    assert ID not in health.diagnose(network, batches(normalised(photos(128, seed=1))), select=[ID])


def test_is_silent_about_another_domain() -> None:
    """The first layer depends on no eps: where it is off, something else is wrong."""
    network = small_variances(1e-3)
    set_eps(network, 1e-5)
    report = health.diagnose(network, batches(3 + 2 * normalised(photos(128, seed=1))), select=[ID])
    assert ID not in report and report.evidence.parts["eps"].others == ()


def test_finds_gammas_that_were_not_imported() -> None:
    network = trained_on(normalised(photos(256)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
    norm.recalibrate(network, batches(normalised(photos(128))))
    finding = health.diagnose(network, batches(normalised(photos(64))), select=[ID])[ID]
    assert finding.severity == "info" and finding.numbers == {"layers": 4, "shifted": 4}
    with torch.no_grad():
        network[1].weight[0] = 1.1  # type: ignore[operator,union-attr]
    assert ID not in health.diagnose(network, batches(normalised(photos(64))), select=[ID])
