import torch

from bnlab import health, norm
from tests.health.checks.photos import batches, normalised, photos, trained_on, with_teacher

ID = "BN107"


def augmented(seed: int) -> torch.Tensor:
    """Half of the contrast, and brighter."""
    return 0.5 * normalised(photos(256, seed=seed)) + 0.5


def test_finds_statistics_of_augmented_images() -> None:
    network = trained_on(normalised(photos(256)))
    labelled = with_teacher(network, normalised(photos(256, seed=1)))
    norm.recalibrate(network, batches(augmented(0)))
    report = health.diagnose(network, labelled, augmented=batches(augmented(2)), select=[ID])
    finding = report[ID]
    assert "1" in finding.layers and finding.numbers["off_share"] > 0.9
    assert finding.cost is not None and finding.cost.after > 0.6 and finding.cost.before < 0.3
    assert ID in health.diagnose(
        network, batches(normalised(photos(256, seed=1))), augmented=batches(augmented(2)), select=[ID]
    )


def test_compares_with_plain_training_images_where_given() -> None:
    network = trained_on(normalised(photos(256)))
    labelled = with_teacher(network, normalised(photos(256, seed=1)))
    norm.recalibrate(network, batches(augmented(0)))
    plain = batches(normalised(photos(256, seed=3)))
    report = health.diagnose(network, labelled, augmented=batches(augmented(2)), reference=plain, select=[ID])
    assert report[ID].cost is not None and report[ID].cost.after > 0.6
    same = health.diagnose(
        network, labelled, augmented=batches(augmented(2)), reference=batches(augmented(3)), select=[ID]
    )
    assert ID not in same


def test_is_silent_about_statistics_of_plain_images() -> None:
    network = trained_on(normalised(photos(256)))
    labelled = with_teacher(network, normalised(photos(256, seed=1)))
    assert ID not in health.diagnose(network, labelled, augmented=batches(augmented(2)), select=[ID])
    unlabelled = [x for x, _ in labelled]
    assert ID not in health.diagnose(network, unlabelled, augmented=batches(augmented(2)), select=[ID])
    plain = batches(normalised(photos(256, seed=2)))
    assert ID not in health.diagnose(network, labelled, augmented=plain, select=[ID])
    assert ID in health.diagnose(network, labelled, select=[ID]).skipped
