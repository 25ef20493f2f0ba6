"""64 images a batch, and fewer in the last one."""

import pytest
import torch
from torch import nn

from bnlab.health import Report, diagnose
from bnlab.norm import freeze


def diagnosed(*sizes: int, images: int | None = None, momentum: float | None = 0.1, frozen: bool = False) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum)).eval()
    if frozen:
        freeze(model)
    return diagnose(model, [torch.randn(n, 3) for n in sizes], images=images, select=["BN106"])


def test_finds_a_short_last_batch() -> None:
    """With 15 in place of 64 images, 0.01 / 15 + ... : a share of 0.1 * 1.9 * (64 / 15 - 1) more."""
    finding = diagnosed(64, 64, 15)["BN106"]
    assert finding.severity == "info"
    assert finding.numbers == {"last_batch": 15, "batch": 64, "growth": pytest.approx(0.6207, abs=1e-4)}


def test_the_growth_is_that_of_a_simulation() -> None:
    """Running means of 200 batches of 64 values, the last one of 4: the variance of 20,000 of them."""
    torch.manual_seed(0)
    means = torch.randn(200, 20_000) / 8
    short = torch.cat([means[:-1], torch.randn(1, 20_000) / 2])
    weights = 0.1 * 0.9 ** torch.arange(199, -1, -1.0)
    growth = float((weights @ short).var() / (weights @ means).var() - 1)
    assert diagnosed(64, 64, 4)["BN106"].numbers["growth"] == pytest.approx(growth, rel=0.05)


@pytest.mark.parametrize("sizes", [(64, 64, 16), (64, 64), (64, 64, 64), (15,)])
def test_is_silent_on_whole_batches(sizes: tuple[int, ...]) -> None:
    assert "BN106" not in diagnosed(*sizes)


def test_batches_of_many_sizes_are_not_judged() -> None:
    assert "BN106" not in diagnosed(64, 32, 15)


def test_the_limit_of_images_does_not_cut_a_batch() -> None:
    assert "BN106" not in diagnosed(64, 64, 15, images=70)


def test_layers_that_do_not_move_have_no_last_batch() -> None:
    assert "BN106" not in diagnosed(64, 64, 15, frozen=True)
    assert "BN106" not in diagnosed(64, 64, 15, momentum=None)  # an average weighs each batch alike
