import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from bnlab import Classifier
from bnlab.classifier.ensemble import Ensemble
from bnlab.classifier.evaluate import Evaluation, Member, evaluate
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.split_csv import Photo
from bnlab.errors import ClassifierError, DataError, DivergedError
from tests.classifier.test_ensemble import changed, permuted


def answers(targets: list[int], probabilities: list[list[float]], classes: str = "abc") -> Evaluation:
    return Evaluation(
        split="val",
        classes=tuple(classes),
        paths=tuple(f"{i}.jpg" for i in range(len(targets))),
        targets=np.array(targets),
        probabilities=np.array(probabilities, dtype=np.float32),
    )


# By hand: a is predicted correctly twice and as b once; b correctly once and as c once; no photo is of c.
KNOWN = answers(
    [0, 0, 0, 1, 1],
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1], [0.0, 0.1, 0.9]],
)


def test_known_answers() -> None:
    assert KNOWN.n == 5
    assert KNOWN.top1 == pytest.approx(3 / 5)
    assert KNOWN.top5 == 1.0
    assert KNOWN.confusion.tolist() == [[2, 1, 0], [0, 1, 1], [0, 0, 0]]
    a, b, c = KNOWN.per_class
    assert (a.n, a.precision, a.recall, a.f1) == (3, 1.0, pytest.approx(2 / 3), pytest.approx(0.8))
    assert (b.n, b.precision, b.recall, b.f1) == (2, 0.5, 0.5, 0.5)
    assert (c.n, c.precision, c.recall) == (0, 0.0, None)
    assert KNOWN.mistakes() == [4, 2]
    assert KNOWN.loss == pytest.approx(-np.log([0.8, 0.6, 0.2, 0.8, 0.1]).mean(), rel=1e-5)


def test_the_interval_is_wilsons() -> None:
    """3 of 5, worked out from the formula."""
    z, n, p = 1.959964, 5, 0.6
    centre, half = (p + z * z / (2 * n)), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = KNOWN.top1_interval
    assert low == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-6)
    assert high == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-6)


def test_calibration_by_hand() -> None:
    """Two photos at 0.8, both correct; 0.6 correct; 0.7 and 0.9 wrong; each of these values has its own bin."""
    expected = (2 * abs(1 - 0.8) + abs(1 - 0.6) + 0.7 + 0.9) / 5
    assert KNOWN.ece == pytest.approx(expected, abs=1e-6)
    assert [(b.n, b.accuracy) for b in KNOWN.bins] == [(1, 1.0), (1, 0.0), (2, 1.0), (1, 0.0)]


def test_a_perfect_classifier_is_calibrated() -> None:
    sure = answers([0, 1, 2], np.eye(3).tolist())
    assert (sure.ece, sure.top1, sure.mistakes()) == (0, 1, [])
    assert sure.top1_interval[1] == pytest.approx(1)


def test_top5_agrees_with_scikit_learn() -> None:
    random = np.random.default_rng(0)
    probabilities = random.dirichlet(np.ones(12), 200)
    targets = random.integers(0, 12, 200)
    ours = answers(targets.tolist(), probabilities.tolist(), "abcdefghijkl").top5
    assert ours == pytest.approx(top_k_accuracy_score(targets, probabilities, k=5))
    assert 0.3 < ours < 0.55


def test_ties_count_the_lower_index_first_in_top5_as_in_top1() -> None:
    """scikit-learn would find both in the top 5, and no top-1 answer correct."""
    level = answers([0, 5], [[1 / 6] * 6] * 2, "abcdef")
    assert (level.top1, level.top5) == (0.5, 0.5)


def test_the_document_is_json() -> None:
    document = json.loads(json.dumps(KNOWN.to_json(), allow_nan=False))
    assert list(document)[:9] == [
        "split", "n", "top1", "top5", "top1_interval", "ece", "classes", "per_class", "confusion",
    ]  # fmt: skip
    assert document["per_class"][2] == {"label": "c", "n": 0, "precision": 0.0, "recall": None, "f1": 0.0}


@pytest.fixture
def classifier(trained: Path) -> Classifier:
    return Classifier.load(trained / "best.safetensors")


def photos_of(trained: Path) -> list[Photo]:
    return open_evaluation_data(trained.parents[1] / "data", "val")[1]


def test_labels_are_matched_by_name(classifier: Classifier, trained: Path) -> None:
    photos = photos_of(trained)
    there = evaluate(classifier, photos, "val")
    back = evaluate(classifier, photos[::-1], "val")
    assert there.n == 12
    assert (there.confusion == back.confusion).all()
    rings = evaluate(classifier, [p for p in photos if p.label == "ring"], "val")
    assert (rings.targets == classifier.classes.index("ring")).all()
    assert rings.n == 4


def test_a_class_the_classifier_does_not_know(classifier: Classifier, trained: Path) -> None:
    photos = [*photos_of(trained), Photo("x.png", "lily", "val", "")]
    with pytest.raises(ClassifierError, match=r"the class 'lily'.*: it knows disc, ring, stripes; rename or remove"):
        evaluate(classifier, photos, "val")


def test_broken_photos_are_not_counted(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    broken = Photo(str(tmp_path / "x.png"), "ring", "val", "")
    evaluation = evaluate(classifier, [broken, *photos_of(trained)], "val")
    assert evaluation.n == 12
    assert len(evaluation.paths) == len(evaluation.targets) == len(evaluation.probabilities) == 12
    assert evaluation.refused[0].path == broken.path
    with pytest.raises(DataError, match=r"not one of 1 photos could be used \(the first: "):
        evaluate(classifier, [broken], "val")


def test_a_network_that_diverged_is_refused(classifier: Classifier, trained: Path) -> None:
    classifier.network.fc.bias.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match="probabilities of the network on val are not finite"):
        evaluate(classifier, photos_of(trained), "val")


def test_evaluation_has_the_members_own_accuracies(classifier: Classifier, trained: Path) -> None:
    photos = open_evaluation_data(trained.parents[1] / "data", "val")[1]
    photos = photos[np.array([0, 1, 2, 3, 4, 5, 8])]  # 4, 2 and 1 of a class, so that guessing differs too
    wrong = permuted(classifier, [1, 2, 0])
    wrong.card = replace(wrong.card, classes=classifier.classes)  # it takes each class for another
    members = [classifier, changed(classifier), wrong]
    found = evaluate(Ensemble(members, ["a", "b", "c"]), photos, "val", crops=10)
    alone = [evaluate(member, photos, "val", crops=10) for member in members]
    assert found.members == tuple(Member(name, one.top1) for name, one in zip("abc", alone, strict=True))
    assert alone[0].top1 != alone[2].top1
    mean = np.mean([one.probabilities for one in alone], axis=0)
    np.testing.assert_allclose(found.probabilities, mean, atol=1e-6)
    document = found.to_json()
    assert (document["crops"], document["members"][1]) == (10, {"classifier": "b", "top1": alone[1].top1})
    assert alone[0].members == ()
    assert "members" not in alone[0].to_json()


def test_classes_are_in_the_first_members_order(classifier: Classifier, trained: Path) -> None:
    photos = open_evaluation_data(trained.parents[1] / "data", "val")[1]
    one = evaluate(classifier, photos, "val")
    turned = evaluate(Ensemble([permuted(classifier, [2, 0, 1]), classifier]), photos, "val")
    assert turned.top1 == one.top1
    assert (turned.confusion == one.confusion[np.ix_([2, 0, 1], [2, 0, 1])]).all()


def test_a_member_that_diverged_is_named(classifier: Classifier, trained: Path) -> None:
    photos = open_evaluation_data(trained.parents[1] / "data", "val")[1]
    broken = changed(classifier)
    broken.network.fc.bias.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"probabilities of b on val are not finite: .*learning_rate"):
        evaluate(Ensemble([classifier, broken], ["a", "b"]), photos, "val")
