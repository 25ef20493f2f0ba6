import pytest
import torch
from torch import Tensor

from bnlab import health
from bnlab.health.checks.wrong_preprocessing import better
from bnlab.health.evidence import Evidence
from bnlab.health.gather.inputs import Trial, Trials
from tests.health.checks.photos import MEAN, STD, batches, normalised, photos, small_network, trained_on, with_teacher

ID = "BN112"
MISTAKES = {
    "to_1": (lambda x: x, "pixels from 0 to 1", False),
    "to_255": (lambda x: 255 * x, "pixels from 0 to 255", False),
    "around_0": (lambda x: 2 * x - 1, "pixels from -1 to 1, (value - 127.5) / 127.5", False),
    "bgr": (lambda x: normalised(x.flip(1)), "pixels from 0 to 1 with ImageNet's mean and std", True),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_finds_the_mistake(mistake: str) -> None:
    network = trained_on(normalised(photos(256)))
    change, looks_like, swapped = MISTAKES[mistake]
    report = health.diagnose(network, batches(change(photos(128, seed=1))), select=[ID])
    finding = report[ID]
    assert finding.layers == ("1",) and finding.severity == "warn"
    assert finding.numbers["swapped"] is swapped
    assert finding.numbers["expected"].startswith("pixels from 0 to 1 with ImageNet's mean and std")
    if mistake != "bgr":  # -1..1 cannot be told from (value - 127) / 128
        assert finding.numbers["input"] in (looks_like, "(value - 127) / 128")
    assert finding.numbers["expected_distance"] < 0.1 < finding.numbers["distance"]
    assert finding.cost is None  # without labels


def test_finds_the_cost_and_what_the_caller_gave() -> None:
    network = trained_on(normalised(photos(256)))
    pixels = photos(256, seed=1)
    labelled = with_teacher(network, normalised(pixels))
    wrong = [(2 * x - 1, y) for x, (_, y) in zip(pixels.split(32), labelled, strict=True)]
    report = health.diagnose(network, wrong, mean=[127.5] * 3, std=[127.5] * 3, select=[ID])
    assert report[ID].numbers["input"] == "images with the given mean and std"
    cost = report[ID].cost
    assert cost is not None and cost.after == 1 and cost.before < 0.9 and cost.n == 256


def test_finds_a_mistake_of_a_network_that_normalises_twice() -> None:
    network = trained_on(normalised(photos(256)))
    twice = normalised(normalised(photos(128, seed=1)))
    finding = health.diagnose(network, batches(twice), select=[ID])[ID]
    assert finding.numbers["input"] == "no usual convention"
    assert finding.numbers["expected"] == "the same before pixels from 0 to 1 with ImageNet's mean and std"


@pytest.mark.parametrize("seed", range(4))
def test_is_silent_about_its_own_preprocessing(seed: int) -> None:
    network = trained_on(normalised(photos(256)), seed)
    report = health.diagnose(network, batches(normalised(photos(128, seed=1 + seed))), select=[ID])
    assert not report.findings and ID not in report.skipped


def test_is_silent_where_another_colour_is_the_domain() -> None:
    """Bluish images are nearer to the statistics with red and blue swapped, but the classes are right as it is."""
    network = trained_on(normalised(photos(256)))
    blue = normalised(photos(256, seed=1, colour=(0.36, 0.46, 0.52)))
    report = health.diagnose(network, with_teacher(network, blue), select=[ID])
    trials = report.evidence.parts["preprocessing"]
    assert trials.best.swapped and trials.best.distance < 0.8 * trials.present.distance
    assert ID not in report


def test_is_silent_about_statistics_that_no_preprocessing_explains() -> None:
    network = small_network()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean += 3 * torch.randn(24, generator=torch.Generator().manual_seed(1))
    assert ID not in health.diagnose(network, batches(normalised(photos(128))), select=[ID])


def test_sees_images_as_they_enter_the_network() -> None:
    """The caller's forward normalises; what reaches the network counts."""
    network = trained_on(normalised(photos(256)))

    def forward(model: torch.nn.Module, batch: Tensor) -> Tensor:
        return torch.as_tensor(model(batch.flip(1).sub(MEAN).div(STD)))

    report = health.diagnose(network, batches(photos(128, seed=1)), forward=forward, select=[ID])
    assert report[ID].numbers["swapped"] is True
    assert ID not in health.diagnose(network, batches(photos(128, seed=1).flip(1)), forward=forward, select=[ID])


def test_is_skipped_without_images() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.BatchNorm1d(8)).eval()
    assert ID in health.diagnose(network, list(torch.randn(64, 5).split(16))).skipped


def test_is_silent_about_bluish_images_without_labels() -> None:
    """Nearer with red and blue swapped, but not near: nothing but the classes could tell, and there are none."""
    network = trained_on(normalised(photos(256)))[:-1]
    blue = normalised(photos(256, seed=1, colour=(0.34, 0.46, 0.6)))
    report = health.diagnose(network, batches(blue), select=[ID], metric=lambda output, _: output[:, 0])
    trials = report.evidence.parts["preprocessing"]
    assert trials.best.swapped and trials.best.distance < 0.5 * trials.present.distance
    assert trials.present.distance - trials.best.distance > 0.15 and ID not in report


TRIALS = {
    "clear": (Trial(name="", distance=0.6), Trial(name="", distance=0.29), None, True),
    "not_near": (Trial(name="", distance=0.9), Trial(name="", distance=0.41), None, False),
    "swapped_and_not_near": (Trial(name="", distance=0.5), Trial(name="", distance=0.2, swapped=True), None, False),
    "slight": (Trial(name="", distance=0.36), Trial(name="", distance=0.28, swapped=True), None, False),
    "slight_and_surer": (Trial(name="", distance=0.36), Trial(name="", distance=0.28, swapped=True), 2.4, True),
    "slight_and_unsure": (Trial(name="", distance=0.36), Trial(name="", distance=0.28, swapped=True), 2.3, False),
    "no_nearer": (Trial(name="", distance=0.31), Trial(name="", distance=0.28, swapped=True), 5.0, False),
}


@pytest.mark.parametrize("case", TRIALS)
def test_rule(case: str) -> None:
    present, best, certainty, found = TRIALS[case]
    trials = Trials(layer="1", present=present, others=(best,), certainty=certainty)
    assert (better(Evidence(layers={}, parts={"preprocessing": trials})) is not None) is found
