import pytest
import torch
from torch import nn

from bnlab import health, norm
from bnlab.health.gather.training_images import DropoutEvidence
from tests.health.checks.photos import batches, normalised, photos, trained_on, with_teacher

SELECT = ["BN108"]


def test_reference_and_augmented_images_are_measured_by_their_own_statistics() -> None:
    network = trained_on(normalised(photos(128)))
    x = normalised(photos(128, seed=1))
    conv = network[0]
    report = health.diagnose(
        network, with_teacher(network, x), reference=batches(x + 1), augmented=batches(2 * x), select=SELECT
    )
    reference, augmented = report.evidence.parts["reference"], report.evidence.parts["augmented"]
    with torch.no_grad():
        mean = conv(x + 1).double().mean((0, 2, 3)).numpy()
        variance = conv(2 * x).double().var((0, 2, 3)).numpy()
    assert reference.evaluation["1"].mean == pytest.approx(mean, abs=1e-5)
    assert augmented.augmented["1"].variance == pytest.approx(variance, rel=1e-4)
    assert augmented.plain is reference.batch and reference.images == 128
    assert len(augmented.by_augmented) == len(augmented.by_plain) == 128
    assert augmented.by_plain is not report.evidence.scores.population


def test_dropout_draws_differ_and_the_generator_is_restored() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    x = list(torch.randn(64, 8).split(16))
    norm.recalibrate(model, x)
    state = torch.get_rng_state()
    found = health.diagnose(model.eval(), x, select=SELECT).evidence.parts["dropout"]
    assert torch.equal(torch.get_rng_state(), state)
    assert found.modules == ("1",) and [*found.ratios] == ["2"]
    assert found.errors["2"] > 0 and not any(m.training for m in model.modules())


def test_no_dropout_means_nothing_to_measure() -> None:
    network = trained_on(normalised(photos(64)))
    report = health.diagnose(network, batches(normalised(photos(64, seed=1))), select=SELECT)
    assert report.evidence.parts["dropout"] == DropoutEvidence(ratios={}, errors={})
    assert "reference" not in report.evidence.parts and "augmented" not in report.evidence.parts


def test_a_failure_is_noted() -> None:
    network = trained_on(normalised(photos(64)))
    report = health.diagnose(
        network, batches(normalised(photos(64))), reference=[torch.zeros(4, 5, 8, 8)], select=SELECT
    )
    assert any("training images" in note for note in report.notes) and "reference" not in report.evidence.parts
