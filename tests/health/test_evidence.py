"""What the checks read."""

import numpy as np
import pytest

from bnlab.health.evidence import PARTS, Evidence, LayerEvidence, Scores, distances, is_off


def test_distances_and_thresholds() -> None:
    mean, variance = np.array([0.0, 0.11, 0.0]), np.array([1.0, 1.0, 1.3])
    off, ratio = distances(mean, variance, np.zeros(3), np.ones(3), 0.0)
    assert off == pytest.approx([0, 0.11, 0])
    assert ratio == pytest.approx([1, 1, 1.3])
    assert is_off(off, ratio).tolist() == [False, True, True]
    assert is_off(np.array([np.nan]), np.array([1.0])).all()


def test_the_weight_of_the_initial_statistics() -> None:
    layer = LayerEvidence(name="bn", kind="", family="batch", channels=1, eps=0.0, momentum=0.1, updates=10)
    assert layer.initial_weight == pytest.approx(0.9**10)


def test_scores_are_compared_by_name() -> None:
    scores = Scores(running=np.array([0.0, 1.0]), population=np.array([1.0, 1.0]))
    comparison = scores.compare("running", "population")
    assert comparison is not None
    assert comparison.gain == 0.5
    assert scores.compare("running", "batch") is None
    assert scores.means() == {"running": 0.5, "batch": None, "population": 1.0}


def test_parts_are_known_by_name() -> None:
    evidence = Evidence(layers={}, parts={"padding": 3})
    assert evidence.has("padding")
    assert evidence.part("padding", int) == 3
    assert not any(evidence.has(part) for part in PARTS if part != "padding")


@pytest.mark.parametrize(("found", "expected"), [(1.0, True), (6.9, True), (7.1, False)])
def test_batches_of_far_fewer_classes_than_chance_gives_are_sorted(found: float, expected: bool) -> None:
    assert Evidence(layers={}, classes_in_batch=(found, 10.0)).sorted_by_class == expected
