import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnlab import Classifier
from bnlab.classifier.ensemble import Ensemble, mean_of, open_classifiers
from bnlab.classifier.predict import Probabilities, classify
from bnlab.data.cache import Cache
from bnlab.data.photo_file import PhotoReader, open_photo
from bnlab.errors import ClassifierError, UsageError


def val_paths(trained: Path) -> list[str]:
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
    paths = val_paths(trained)[::4]
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
    paths = val_paths(trained)[:3]
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
    paths, read, real = val_paths(trained), Counter[str](), PhotoReader.open

    def counted(reader: PhotoReader, path: str) -> Any:
        read[path] += 1
        return real(reader, path)

    monkeypatch.setattr(PhotoReader, "open", counted)
    whole = changed(classifier, crop_fraction=1.0)
    members = [classifier, changed(classifier, mean=(0.1, 0.2, 0.3)), whole]
    classify(members, paths, crops=10)
    assert read == dict.fromkeys(paths, 1)
    read.clear()
    classify(members, paths)  # one crop depends on crop_fraction
    assert read == dict.fromkeys(paths, 2)


def test_an_open_file_is_read_once_for_all_members(classifier: Classifier, trained: Path) -> None:
    ensemble, path = Ensemble([classifier, changed(classifier, size=48)]), val_paths(trained)[0]
    with open(path, "rb") as file:  # noqa: PTH123
        assert ensemble.predict(file)[0].top == ensemble.predict(path)[0].top


def test_broken_photos_are_reported_once(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    paths = [str(tmp_path / "x.png"), *val_paths(trained)[:2]]
    for crops in (1, 10):
        each, errors = classify([classifier, changed(classifier, size=40)], paths, crops=crops)  # type: ignore[arg-type]
        assert [error is None for error in errors] == [False, True, True]
        found = mean_of(each)
        assert np.isnan(found[0]).all()
        np.testing.assert_allclose(found[1:].sum(1), 1, atol=1e-6)


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
    with pytest.raises(UsageError, match="1 classifiers with 2 names is not valid"):
        Ensemble([classifier], ["a", "b"])
    for members in ([], ["runs/a"]):
        with pytest.raises(UsageError, match=r"needs one or more classifiers: pass a list of Classifier.load\(FILE\)"):
            Ensemble(members)  # type: ignore[arg-type]
    assert Ensemble([classifier] * 2).names == ("classifier 1", "classifier 2")
    with pytest.raises(UsageError, match="one preprocessing, and these classifiers have 2: leave the cache out"):
        classify([classifier, changed(classifier, size=40)], val_paths(trained), cache=Cache(12, 10**6))


def test_predictions_are_those_of_the_mean(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("text")
    paths = [*val_paths(trained)[::5], str(tmp_path / "x.png")]
    ensemble = Ensemble([changed(classifier), permuted(classifier, [2, 0, 1])])
    expected = answers(ensemble, paths[:-1])
    *found, broken = ensemble.predict(paths, top=2)
    for prediction, row in zip(found, expected, strict=True):
        assert prediction.label == ensemble.classes[row.argmax()]
        assert prediction.probability == row.max()
        assert len(prediction.top) == 2
    assert broken.error
    pixels = np.stack([np.asarray(open_photo(path)) for path in paths[:-1]])
    assert (ensemble.predict_proba(pixels) == expected).all()
    assert ensemble.predict([]) == []
    assert [one.label for one in ensemble.predict(paths[0])] == [found[0].label]
    assert [one.top for one in ensemble.predict(iter(pixels), top=2)] == [one.top for one in found]
    with pytest.raises(UsageError, match="photo 1 is an object of type int"):
        ensemble.predict([3])  # type: ignore[list-item]


def test_what_is_opened_as_an_ensemble(classifier: Classifier, trained: Path) -> None:
    file = trained / "best.safetensors"
    assert open_classifiers(classifier).members == (classifier,)
    assert open_classifiers(str(trained)).names == (str(file),)
    two = open_classifiers([file, Classifier(classifier.network, classifier.card)])
    assert two.names == (str(file), "classifier 2")
    assert open_classifiers(two).members == two.members
    assert "bn_small_inception" in repr(two)
    for wrong, device in ((classifier, "cuda"), (Ensemble([classifier]), "mps")):
        with pytest.raises(UsageError, match=f"is on cpu, not on {device}"):
            open_classifiers(wrong, device)
    with pytest.raises(UsageError, match="there is no classifier: pass a classifier file"):
        open_classifiers([])
    for odd, kind in ((None, "NoneType"), (3, "int"), ([file, 3], "int"), ([two], "Ensemble"), (b"ab", "int")):
        with pytest.raises(UsageError, match=f"cannot be of the type {kind}: pass a classifier file"):
            open_classifiers(odd)  # type: ignore[arg-type]
