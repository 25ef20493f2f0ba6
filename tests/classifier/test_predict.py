import copy
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bnlab import Classifier, norm
from bnlab.classifier import predict
from bnlab.classifier.predict import classify
from bnlab.data.cache import Cache
from bnlab.data.preprocess import open_photo, preprocess, tta_crops
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
    with pytest.raises(UsageError, match=r"list of paths, not one \(a.jpg\): pass a list"):
        classifier.predict("a.jpg")
    with pytest.raises(UsageError, match=r"top 0 .* at least 1"):
        classifier.predict(["a.jpg"], top=0)


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
