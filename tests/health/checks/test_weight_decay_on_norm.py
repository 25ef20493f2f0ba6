"""What the optimiser's groups do to gamma and beta."""

import pytest
import torch
from torch import nn

from bnlab import health
from tests.health.checks.named_networks import images, sound_network, teacher_batches


def groups(network: nn.Module, decay: float) -> list[dict[str, object]]:
    return [
        {"params": [p for p in network.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in network.parameters() if p.ndim <= 1], "weight_decay": decay},
    ]


def found(network: nn.Module, optimizer: torch.optim.Optimizer) -> list[health.Finding]:
    return [*health.diagnose(network, images(64, 32), optimizer=optimizer, select=["BN014"]).findings]


def test_finds_decay_of_gamma_and_beta() -> None:
    network = sound_network()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
    finding = health.diagnose(network, teacher_batches(network), optimizer=optimizer)["BN014"]
    assert (finding.layers, finding.severity) == (("bn1", "bn2"), "info")
    assert finding.numbers["weight_decay"] == {name: {"weight": 0.05, "bias": 0.05} for name in ("bn1", "bn2")}


def test_is_silent_where_they_have_their_own_group() -> None:
    network = sound_network()
    optimizer = torch.optim.SGD(groups(network, 0.0), lr=0.1)
    assert "BN014" not in health.diagnose(network, teacher_batches(network), optimizer=optimizer)
    assert found(network, torch.optim.SGD(groups(network, 1e-5), lr=0.1))


def test_parameters_that_are_not_trained_do_not_count() -> None:
    network = sound_network()
    for layer in (network.bn1, network.bn2):
        layer.requires_grad_(False)
    assert not found(network, torch.optim.SGD(network.parameters(), lr=0.1, weight_decay=1e-4))


def test_finds_parameters_that_the_optimiser_lacks() -> None:
    network = sound_network()
    optimizer = torch.optim.SGD([p for n, p in network.named_parameters() if n != "bn2.weight"], lr=0.1)
    (finding,) = found(network, optimizer)
    assert (finding.layers, finding.severity) == (("bn2",), "info")
    assert finding.numbers["missing"] == ["bn2.weight"]


def test_finds_the_optimiser_of_another_model() -> None:
    network, other = sound_network(), sound_network()
    (finding,) = found(network, torch.optim.SGD(other.parameters(), lr=0.1))
    assert finding.severity == "warn"
    assert finding.numbers["foreign"] == len(list(other.parameters()))


def test_without_an_optimiser_it_is_skipped() -> None:
    report = health.diagnose(sound_network(), images(64, 32), select=["BN014"])
    assert "optimizer=" in report.skipped["BN014"]


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_a_layer_that_is_the_model_itself(decay: float) -> None:
    layer = nn.BatchNorm2d(3).eval()
    findings = found(layer, torch.optim.SGD([layer.weight], lr=0.1, weight_decay=decay))
    assert len(findings) == (2 if decay else 1)  # gamma decays; beta is not there
    assert findings[-1].numbers["missing"] == ["bias"]
