import pytest
from torch import Tensor
from torch.nn import functional as F

from bnlab import health
from bnlab.health.checks.resolution_shift import check
from bnlab.health.evidence import Evidence
from bnlab.health.gather.inputs import Trial, Trials
from tests.health.checks.photos import batches, normalised, photos, trained_on

ID = "BN113"


def halved(images: Tensor) -> Tensor:
    return F.interpolate(images, (32, 32), mode="bilinear", antialias=True)


@pytest.mark.parametrize("too_large", [True, False])
def test_finds_images_of_another_size(too_large: bool) -> None:
    """Smooth images, whose details grow with their size."""
    trained, own = normalised(photos(256, 64, power=3)), normalised(photos(128, 64, seed=1, power=3))
    network = trained_on(halved(trained) if too_large else trained, seed=2)
    finding = health.diagnose(network, batches(own if too_large else halved(own)), select=[ID])[ID]
    assert finding.numbers["factor"] == (0.5 if too_large else 2.0)
    assert ("32 x 32 pixels, and the images have 64 x 64" in finding.message) is too_large
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


@pytest.mark.parametrize(("explained", "found"), [(False, True), (True, False)])
def test_preprocessing_that_explains_the_distance_comes_first(explained: bool, found: bool) -> None:
    size = Trials(layer="1", present=Trial(name="", distance=0.3), others=(Trial(name="", distance=0.1, value=0.5),))
    pixels = Trials(layer="1", present=Trial(name="", distance=0.5), others=(Trial(name="", distance=0.1),) * explained)
    assert bool(check(Evidence(layers={}, parts={"resolution": size, "preprocessing": pixels}))) is found
