"""Batches with one value for each channel."""

import pytest
import torch
from torch import Tensor, nn

from bnlab import health, norm


class Head(nn.Module):
    """A convolution, then a layer with one position: its batches have as many values as images."""

    def __init__(self, *, tracks: bool = True, kind: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.head = kind(4, track_running_stats=tracks)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x)).mean((2, 3), keepdim=True)
        return self.fc(self.head(x).flatten(1))


def images(*sizes: int) -> list[Tensor]:
    return [torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(size)) for size in sizes]


def test_finds_batches_of_one_image() -> None:
    report = health.diagnose(Head().eval(), images(1, 1, 1))
    found = report["single-value"]
    assert (found.id, found.severity, found.layers) == ("BN001", "error", ("head",))
    assert found.numbers["batches"] == 3
    assert found.numbers["batch_size"] == found.numbers["values_per_image"] == 1
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # what the finding says
        Head().train()(images(1)[0])


def test_finds_the_last_batch() -> None:
    """It is an error in training alone, which the batches need not be of."""
    network = Head().eval()
    found = health.diagnose(network, images(8, 8, 1))["BN001"]
    assert (found.severity, found.layers, found.numbers["batches"]) == ("info", ("head",), 1)
    report = health.diagnose(network, images(8, 8, 1), train_step=lambda model, x: model(x))
    assert report["BN001"].severity == "error"


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, norm.BatchNorm2d], ids=["torch", "bnlab"])
def test_finds_a_last_batch_that_fails_in_evaluation_too(kind: type[nn.Module]) -> None:
    """Without running statistics, the layer is diagnosed all the same."""
    network = Head(tracks=False, kind=kind).eval()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        network(images(1)[0])
    report = health.diagnose(network, images(8, 8, 1))
    assert report.images == 17
    assert report["BN001"].severity == "error"
    assert network.head.running_mean is None


def test_is_silent_for_a_last_batch_of_two_and_for_more_positions() -> None:
    assert "BN001" not in health.diagnose(Head().eval(), images(8, 8, 2))
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).eval()
    assert "BN001" not in health.diagnose(network, images(1, 1))


def test_is_silent_for_a_frozen_layer() -> None:
    network = Head().eval()
    norm.freeze(network)
    assert "BN001" not in health.diagnose(network, images(1, 1))
