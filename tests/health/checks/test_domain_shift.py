import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from tests.health.checks.photos import MEAN, STD, batches, normalised, photos, trained_on, with_teacher

ID = "BN111"


def camera(n: int, seed: int) -> Tensor:
    """Another camera: little contrast, yellowish."""
    return normalised(0.55 * photos(n, seed=seed) + torch.tensor([0.35, 0.3, 0.1]).view(3, 1, 1))


def stale(network: nn.Module) -> nn.Module:
    """Weights move after the statistics were measured."""
    torch.manual_seed(5)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data += 0.7 * module.weight.data.std() * torch.randn_like(module.weight)
    return network


def test_finds_another_camera() -> None:
    network = trained_on(normalised(photos(256)))
    report = health.diagnose(network, batches(camera(256, 1)), select=[ID])
    finding = report[ID]
    assert finding.severity == "info" and "1" in finding.layers
    trained = torch.tensor(finding.numbers["trained_mean_colour"]).view(3, 1, 1) * STD + MEAN
    assert trained.flatten().tolist() == pytest.approx(photos(256).mean((0, 2, 3)).tolist(), abs=0.02)


def test_finds_it_against_training_images_and_its_cost() -> None:
    network = trained_on(normalised(photos(256)))
    labels = [y for _, y in with_teacher(network, normalised(photos(256, seed=1)))]
    shifted = list(zip(camera(256, 1).split(32), labels, strict=True))
    report = health.diagnose(network, shifted, reference=batches(normalised(photos(256, seed=2))), select=[ID])
    assert report[ID].severity == "warn"
    assert report[ID].cost is not None and report[ID].cost.gain > 0.1


@pytest.mark.parametrize("seed", range(4))
def test_is_silent_about_images_like_those_of_the_training(seed: int) -> None:
    network = trained_on(normalised(photos(256)), seed)
    own = batches(normalised(photos(128, seed=1 + seed)), 16)
    assert ID not in health.diagnose(network, own, select=[ID])
    reference = batches(normalised(photos(128, seed=10 + seed)), 16)
    assert ID not in health.diagnose(network, own, reference=reference, select=[ID])


def test_is_silent_about_stale_statistics() -> None:
    """Without training images, their means do not suit the weights; with some, both sets of images are off alike."""
    network = stale(trained_on(normalised(photos(256))))
    own = batches(normalised(photos(256, seed=1)))
    report = health.diagnose(network, own, select=[ID])
    colours = report.evidence.parts["colours"]
    assert colours.unexplained > 0.1 * colours.size and ID not in report
    reference = batches(normalised(photos(256, seed=2)))
    assert ID not in health.diagnose(network, own, reference=reference, select=[ID])
    # both at once: the reference tells
    assert ID in health.diagnose(network, batches(camera(256, 1)), reference=reference, select=[ID])


def test_is_silent_about_statistics_that_still_weigh_the_initial_ones() -> None:
    network = trained_on(normalised(photos(256)))
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.mul_(0.3)
            module.running_var.mul_(0.3).add_(0.7)
    assert ID not in health.diagnose(network, batches(normalised(photos(256, seed=1))), select=[ID])


def test_is_silent_where_preprocessing_explains_it() -> None:
    network = trained_on(normalised(photos(256)))
    report = health.diagnose(network, batches(photos(256, seed=1)), select=[ID, "BN112"])
    assert ID not in report and "BN112" in report
