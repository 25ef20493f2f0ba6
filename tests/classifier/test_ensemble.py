import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnlab import Classifier
from bnlab.classifier.ensemble import Ensemble, mean_of
from bnlab.classifier.evaluate import Member, evaluate
from bnlab.classifier.predict import Probabilities, classify
from bnlab.data import loader
from bnlab.data.cache import Cache
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.preprocess import open_photo
from bnlab.errors import ClassifierError, DivergedError, UsageError


@pytest.fixture
def classifier(trained: Path) -> Classifier:
    return Classifier.load(trained / "best.safetensors")


def paths_of(trained: Path) -> list[str]:
    return [str(p) for p in sorted((trained.parents[1] / "data" / "val").rglob("*.png"))]


def changed(classifier: Classifier, seed: int = 1, **preprocessing: Any) -> Classifier:
    """Another network: its last layer is not the same."""
    network = copy.deepcopy(classifier.network)
    with torch.no_grad():
        noise = torch.randn(network.fc.weight.shape, generator=torch.Generator().manual_seed(seed))
        network.fc.weight += 0.3 * noise
    return Classifier(
        network, replace(classifier.card, preprocessing=replace(classifier.card.preprocessing, **preprocessing))
    )


def permuted(classifier: Classifier, order: list[int]) -> Classifier:
    """The same classifier with its classes in another order."""
    network = copy.deepcopy(classifier.network)
    with torch.no_grad():
        network.fc.weight.copy_(network.fc.weight[order].clone())
        network.fc.bias.copy_(network.fc.bias[order].clone())
    return Classifier(network, replace(classifier.card, classes=tuple(classifier.classes[i] for i in order)))


def answers(classifier: Classifier | Ensemble, paths: list[str], **options: Any) -> Probabilities:
    ensemble = classifier if isinstance(classifier, Ensemble) else Ensemble([classifier])
    return mean_of(ensemble.in_order(classify(ensemble.members, paths, **options)[0]))


@pytest.mark.parametrize("crops", [1, 10])
def test_classes_are_matched_by_name(classifier: Classifier, trained: Path, crops: int) -> None:
    paths = paths_of(trained)[::4]
    first, other = changed(classifier), permuted(classifier, [2, 0, 1])
    assert other.classes == ("stripes", "disc", "ring")
    expected = (answers(first, paths, crops=crops) + answers(classifier, paths, crops=crops)) / 2
    ensemble = Ensemble([first, other])
    assert ensemble.classes == ("disc", "ring", "stripes")
    np.testing.assert_allclose(answers(ensemble, paths, crops=crops), expected, atol=1e-6)
    turned = Ensemble([other, first])
    assert turned.classes == other.classes
    np.testing.assert_allclose(answers(turned, paths, crops=crops), expected[:, [2, 0, 1]], atol=1e-6)
    assert abs(answers(first, paths) - answers(classifier, paths)).max() > 0.01


def test_each_member_has_its_own_preprocessing(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained)[:3]
    members = [
        classifier,
        changed(classifier, 1, size=40),
        changed(classifier, 2, mean=(0.1, 0.2, 0.3)),
        changed(classifier, 3, flip_tta=True),
        changed(classifier, 4, crop_fraction=0.5),
    ]
    for crops in (1, 10):
        apart = [answers(member, paths, crops=crops) for member in members]
        each, errors = classify(members, paths, crops=crops)  # type: ignore[arg-type]
        assert errors == [None] * len(paths)
        for found, expected in zip(each, apart, strict=True):
            assert (found == expected).all()
        mean = np.mean(apart, axis=0)
        np.testing.assert_allclose(answers(Ensemble(members), paths, crops=crops), mean, atol=1e-6)


def test_photos_are_read_once_for_members_that_take_the_same_pixels(
    classifier: Classifier, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, read = paths_of(trained), Counter[str]()

    def counted(path: str, at_least: int = 0) -> Any:
        read[path] += 1
        return open_photo(path, at_least)

    monkeypatch.setattr(loader, "open_photo", counted)
    whole = changed(classifier, crop_fraction=1.0)
    members = [classifier, changed(classifier, mean=(0.1, 0.2, 0.3)), whole]
    classify(members, paths, crops=10)
    assert read == dict.fromkeys(paths, 1)
    read.clear()
    classify(members, paths)  # one crop depends on crop_fraction
    assert read == dict.fromkeys(paths, 2)


def test_broken_photos_are_reported_once(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    paths = [str(tmp_path / "x.png"), *paths_of(trained)[:2]]
    for crops in (1, 10):
        each, errors = classify([classifier, changed(classifier, size=40)], paths, crops=crops)  # type: ignore[arg-type]
        assert [error is None for error in errors] == [False, True, True]
        found = mean_of(each)
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1:].sum(1), 1, atol=1e-6)


def test_evaluation_has_the_members_own_accuracies(classifier: Classifier, trained: Path) -> None:
    photos = open_evaluation_data(trained.parents[1] / "data", "val")[1]
    photos = photos.take(np.array([0, 1, 2, 3, 4, 5, 8]))  # 4, 2 and 1 of a class, so that guessing differs too
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


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (("disc", "ring", "lily"), "a.safetensors has the class 'stripes' and b.safetensors has not"),
        (("disc", "ring", "stripes", "li\nly"), r"b.safetensors has the class 'li\nly' and a.safetensors has not"),
    ],
)
def test_different_classes_are_refused(classifier: Classifier, classes: tuple[str, ...], message: str) -> None:
    other = Classifier(classifier.network, replace(classifier.card, classes=classes))
    with pytest.raises(ClassifierError) as error:
        Ensemble([classifier, other], ["a.safetensors", "b.safetensors"])
    assert str(error.value).startswith(message)


def test_members_need_names_and_one_preprocessing_a_cache(classifier: Classifier, trained: Path) -> None:
    for members, names in (([], []), ([classifier], ["a", "b"])):
        with pytest.raises(UsageError, match=f"{len(members)} classifiers with {len(names)} names is not valid"):
            Ensemble(members, names)
    assert Ensemble([classifier] * 2).names == ("classifier 1", "classifier 2")
    with pytest.raises(UsageError, match="one preprocessing, and these classifiers have 2: leave the cache out"):
        classify([classifier, changed(classifier, size=40)], paths_of(trained), cache=Cache(12, 10**6))


def test_a_member_that_diverged_is_named(classifier: Classifier, trained: Path) -> None:
    photos = open_evaluation_data(trained.parents[1] / "data", "val")[1]
    broken = changed(classifier)
    broken.network.fc.bias.data.fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"probabilities of b on val are not finite: .*--learning-rate"):
        evaluate(Ensemble([classifier, broken], ["a", "b"]), photos, "val")
