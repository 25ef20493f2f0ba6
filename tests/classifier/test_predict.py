import copy
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bnlab import Classifier, norm
from bnlab.classifier import predict
from bnlab.classifier.predict import Ensemble, Probabilities, classify, mean_of
from bnlab.data.cache import Cache
from bnlab.data.photo_file import PhotoReader, open_photo
from bnlab.data.preprocess import preprocess, tta_crops
from bnlab.errors import ClassifierError, UsageError
from bnlab.progress import NullProgress, Task


@pytest.fixture
def classifier(trained: Path) -> Classifier:
    return Classifier.load(trained / "best.safetensors")


def paths_of(trained: Path) -> list[str]:
    return [str(p) for p in sorted((trained.parents[1] / "data").rglob("*.png"))]


def test_a_prediction_has_the_most_probable_classes(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained)[::-1]
    predictions = classifier.predict(paths, top=2)
    assert [p.path for p in predictions] == paths
    for p in predictions:
        assert p.label == p.top[0].label
        assert p.probability == p.top[0].probability >= p.top[1].probability
        assert len(p.top) == 2
        assert p.error is None


def test_the_batch_size_does_not_change_the_answers(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained)
    (one,), _ = classify([classifier], paths, batch_size=1)
    (many,), _ = classify([classifier], paths, batch_size=64)
    assert one.shape == (36, 3)
    np.testing.assert_allclose(one.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-5)


def test_answers_are_the_networks_for_the_preprocessed_photo(classifier: Classifier, trained: Path) -> None:
    """By hand, in float64."""
    path = paths_of(trained)[5]
    preprocessing = classifier.card.preprocessing
    pixels = preprocess(open_photo(path), preprocessing).astype(float) / 255
    image = torch.from_numpy((pixels - preprocessing.mean) / preprocessing.std).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = classifier.network.double().eval()(image).softmax(1)[0]
    classifier.network.float()
    predicted = {c.label: c.probability for c in classifier.predict([path], top=3)[0].top}
    assert [predicted[label] for label in classifier.classes] == pytest.approx(expected.tolist(), abs=1e-5)


def test_flip_tta_averages_with_the_mirror_image(classifier: Classifier, trained: Path) -> None:
    pixels = np.stack([preprocess(open_photo(path), classifier.card.preprocessing) for path in paths_of(trained)])
    apart = [classifier.probabilities(np.ascontiguousarray(some)) for some in (pixels, pixels[:, :, ::-1])]
    classifier.card = replace(classifier.card, preprocessing=replace(classifier.card.preprocessing, flip_tta=True))
    np.testing.assert_allclose(classifier.probabilities(pixels), (apart[0] + apart[1]) / 2, atol=1e-6)
    assert abs(apart[0] - apart[1]).max() > 1e-3


def test_one_crop_is_the_preprocessed_photo_bit_for_bit(classifier: Classifier, trained: Path) -> None:
    """Against photos preprocessed, stacked and classified in batches."""
    paths, preprocessing = paths_of(trained), classifier.card.preprocessing
    for flip_tta in (False, True):
        classifier.card = replace(classifier.card, preprocessing=replace(preprocessing, flip_tta=flip_tta))
        batches = [
            np.stack([preprocess(open_photo(p), preprocessing) for p in paths[i : i + 8]]) for i in range(0, 36, 8)
        ]
        expected = np.concatenate([classifier.probabilities(batch) for batch in batches])
        for options in ({}, {"crops": 1}):
            (found,), _ = classify([classifier], paths, batch_size=8, **options)  # type: ignore[arg-type]
            assert found.dtype == np.float32
            assert (found == expected).all()


@pytest.mark.parametrize("number", [10, 144])
def test_the_answers_for_the_crops_are_averaged(classifier: Classifier, trained: Path, number: Any) -> None:
    """Against each crop and each mirror image by itself, in float64."""
    paths = paths_of(trained)[: 1 if number == 144 else 3]
    (found,), _ = classify([classifier], paths, crops=number)
    preprocessing = classifier.card.preprocessing
    network = copy.deepcopy(classifier.network).double().eval()
    for path, row in zip(paths, found, strict=True):
        made = tta_crops(open_photo(path), preprocessing, number)
        images = [image for crop in made for image in (crop, np.fliplr(crop))]
        assert len(images) == number
        total = np.zeros(3)
        for pixels in images:
            image = torch.from_numpy((pixels / 255 - preprocessing.mean) / preprocessing.std).permute(2, 0, 1)[None]
            with torch.no_grad():
                total += network(image).softmax(1)[0].numpy()
        np.testing.assert_allclose(row, total / number, atol=2e-5)
    (alone,), _ = classify([classifier], paths)
    assert abs(alone - found).max() > 1e-3


@pytest.mark.parametrize("flip_tta", [False, True])
def test_the_network_gets_each_crop_once_in_batches(classifier: Classifier, trained: Path, flip_tta: bool) -> None:
    """Whatever the card has for flip_tta, since mirror images are among the crops."""
    paths, seen = paths_of(trained)[:5], []
    (expected,), _ = classify([classifier], paths, crops=10)
    classifier.card = replace(classifier.card, preprocessing=replace(classifier.card.preprocessing, flip_tta=flip_tta))
    classifier.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for batch_size, batches in ((1, [1] * 10 * 5), (3, [3, 3, 2, 2] * 5), (10, [10] * 4 + [5] * 2), (64, [25] * 2)):
        seen.clear()
        (found,), _ = classify([classifier], paths, crops=10, batch_size=batch_size)
        assert seen == batches
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("photos", "crops", "folded"), [(9, 10, False), (10, 10, True), (99, 1, False), (100, 1, True)]
)
def test_batch_normalisation_is_folded_for_a_hundred_images(
    classifier: Classifier, trained: Path, monkeypatch: pytest.MonkeyPatch, photos: int, crops: Any, folded: bool
) -> None:
    paths = (paths_of(trained) * 3)[:photos]
    (plain,), _ = classify([classifier], paths[:5], crops=crops)
    models: list[torch.nn.Module] = []
    monkeypatch.setattr(predict, "fold", lambda network: models.append(network) or norm.fold(network))
    (found,), _ = classify([classifier], paths, crops=crops)
    assert models == [classifier.network] * folded
    np.testing.assert_allclose(found[:5], plain, atol=1e-5)


def test_changed_weights_change_the_answers(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained) * 3
    (before,), _ = classify([classifier], paths)
    classifier.network.fc.bias.data[0] += 5
    (after,), _ = classify([classifier], paths)
    assert (after[:, 0] > before[:, 0]).all()


def test_crops_can_be_cached(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    for i, path in enumerate(paths_of(trained)[:3]):
        shutil.copy(path, tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    cache = Cache(3, 10**7)
    (first,), _ = classify([classifier], paths, crops=144, cache=cache)
    assert cache.used == 3 * 72 * 32 * 32 * 3
    for path in paths:
        Path(path).unlink()
    (again,), errors = classify([classifier], paths, crops=144, cache=cache)
    assert errors == [None] * 3
    assert (first == again).all()


def test_progress_counts_photos(classifier: Classifier, trained: Path) -> None:
    class Counting(NullProgress):
        def __init__(self) -> None:
            super().__init__()
            self.totals: list[tuple[int, str]] = []
            self.advanced: list[int] = []

        def task(self, title: str, total: int, unit: str, done: int = 0) -> AbstractContextManager[Task]:
            self.totals.append((total, unit))
            return self._counted()

        @contextmanager
        def _counted(self) -> Iterator[Task]:
            yield self

        def advance(self, count: int = 1, **values: float) -> None:
            self.advanced.append(count)

    progress = Counting()
    classify([classifier], paths_of(trained)[:5], crops=10, batch_size=10, progress=progress)
    assert (progress.totals, progress.advanced) == ([(5, "photos")], [2, 2, 1])


def test_other_numbers_of_crops_are_refused(classifier: Classifier, trained: Path) -> None:
    with pytest.raises(UsageError, match=r"crops 5 .*1, 10, 144"):
        classify([classifier], paths_of(trained), crops=5)  # type: ignore[arg-type]


def test_broken_photos_do_not_stop_the_others(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("text")
    good = paths_of(trained)[:3]
    predictions = classifier.predict([good[0], tmp_path / "x.jpg", good[1], tmp_path / "none.jpg", good[2]])
    assert [p.error is None for p in predictions] == [True, False, True, False, True]
    assert predictions[1].label is predictions[1].probability is None
    alone = classifier.predict(good)
    assert [p.label for p in predictions if not p.error] == [p.label for p in alone]
    assert classifier.predict([]) == []


def test_wrong_arguments_are_refused(classifier: Classifier) -> None:
    with pytest.raises(UsageError, match=r"photo 2 is None: pass a path, bytes"):
        classifier.predict(["a.jpg", None])  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"top 0 .* at least 1"):
        classifier.predict(["a.jpg"], top=0)


def test_every_kind_of_photo_has_the_same_prediction(classifier: Classifier, trained: Path) -> None:
    path = paths_of(trained)[0]
    content = Path(path).read_bytes()
    image = Image.open(path)
    pixels = np.asarray(image.convert("RGB"))
    with Path(path).open("rb") as file:
        photos: list[Any] = [path, Path(path), content, file, image, pixels, torch.from_numpy(pixels.copy())]
        found = classifier.predict(photos)
        assert not file.closed
    assert {p.top for p in found} == {found[0].top}
    assert [p.path for p in found] == [path, path, *(f"photo {i}" for i in range(3, 8))]
    for photo in (path, content, image, pixels):  # one photo alone
        (alone,) = classifier.predict(photo)
        assert [c.label for c in alone.top] == [c.label for c in found[0].top]
        assert alone.probability == pytest.approx(found[0].probability, abs=1e-6)
    assert classifier.predict(iter([content, content[:50]]))[1].error is not None
    assert [p.path for p in classifier.predict(str(name) for name in [path, path])] == [path, path]


def test_predict_reads_pictures_in_the_range_of_the_card(classifier: Classifier, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint16)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(values).save(tmp_path / "16.png")
    progress = NullProgress()
    unset = changed(classifier)
    (dark,) = unset.predict(tmp_path / "16.png", progress=progress)
    assert progress.warnings[0].endswith("train with --set pixel_range=255")
    ranged = changed(classifier, pixel_range=(0.0, 255.0))
    plain, deep = ranged.predict([tmp_path / "8.png", tmp_path / "16.png"])
    assert plain.top == deep.top != dark.top
    both, _ = classify([unset, ranged], [str(tmp_path / "16.png")])
    assert (both[0] != both[1]).any()


def test_predict_has_a_limit_of_pixels(classifier: Classifier, trained: Path) -> None:
    (refused,) = classifier.predict(paths_of(trained)[:1], max_megapixels=0.001)
    assert "max_megapixels" in str(refused.error)


def test_broken_weights_are_refused(classifier: Classifier, trained: Path) -> None:
    classifier.network.fc.bias.data.fill_(float("nan"))
    with pytest.raises(ClassifierError, match="not finite: train it again"):
        classifier.predict(paths_of(trained)[:1])


def test_a_network_in_training_mode_stays_in_it(classifier: Classifier) -> None:
    classifier.network.train()
    before = {k: v.clone() for k, v in classifier.network.state_dict().items()}
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    first = classifier.probabilities(pixels)
    assert classifier.network.training
    assert (first == classifier.probabilities(pixels)).all()  # no dropout, no batch statistics
    assert all(torch.equal(before[k], v) for k, v in classifier.network.state_dict().items())


def test_a_missing_device_is_refused(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="PyTorch finds no cuda device here"):
        Classifier.load(trained / "best.safetensors", device="cuda")


# Ensembles.


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
    for members, names in (([], []), ([classifier], ["a", "b"])):
        with pytest.raises(UsageError, match=f"{len(members)} classifiers with {len(names)} names is not valid"):
            Ensemble(members, names)
    assert Ensemble([classifier] * 2).names == ("classifier 1", "classifier 2")
    with pytest.raises(UsageError, match="one preprocessing, and these classifiers have 2: leave the cache out"):
        classify([classifier, changed(classifier, size=40)], val_paths(trained), cache=Cache(12, 10**6))
