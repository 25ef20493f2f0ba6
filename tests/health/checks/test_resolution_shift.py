import pytest
from torch.nn import functional as F

from bnlab import health
from tests.health.checks.photos import batches, normalised, photos, trained_on

ID = "BN113"


def test_finds_images_that_are_too_large() -> None:
    network = trained_on(normalised(photos(256, 32)))
    large = F.interpolate(normalised(photos(128, 32, seed=1)), (64, 64), mode="bilinear")
    finding = health.diagnose(network, batches(large), select=[ID])[ID]
    assert finding.numbers["factor"] == 0.5 and "32 x 32" in finding.message and "64 x 64" in finding.message
    assert finding.numbers["scaled_distance"] * 1.5 < finding.numbers["distance"]


@pytest.mark.parametrize("seed", range(3))
def test_is_silent_at_the_size_of_the_training(seed: int) -> None:
    network = trained_on(normalised(photos(256, 32)), seed)
    report = health.diagnose(network, batches(normalised(photos(128, 32, seed=1))), select=[ID])
    assert not report.findings and ID not in report.skipped


def test_is_silent_where_preprocessing_explains_it() -> None:
    network = trained_on(normalised(photos(256, 32)))
    report = health.diagnose(network, batches(photos(128, 32, seed=1)), select=[ID, "BN112"])
    assert ID not in report and "BN112" in report
