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

from bnlab import Classifier
from bnlab.data.cache import Cache
from bnlab.data.preprocess import open_photo, preprocess, tta_crops
from bnlab.errors import UsageError
from bnlab.progress import NullProgress, Task


@pytest.fixture
def classifier(trained: Path) -> Classifier:
    return Classifier.load(trained / "best.safetensors")


def paths_of(trained: Path) -> list[str]:
    return [str(p) for p in sorted((trained.parents[1] / "data").rglob("*.png"))]


def test_a_prediction_says_it_all(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained)[::-1]
    predictions = classifier.predict(paths, top=2)
    assert [p.path for p in predictions] == paths
    for p in predictions:
        assert p.label == p.top[0].label
        assert p.probability == p.top[0].probability >= p.top[1].probability
        assert len(p.top) == 2
        assert p.error is None


def test_the_batch_does_not_matter(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained)
    one, _ = classifier.classify(paths, batch_size=1)
    many, _ = classifier.classify(paths, batch_size=64)
    assert one.shape == (36, 3)
    np.testing.assert_allclose(one.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(one, many, rtol=0, atol=1e-5)


def test_it_is_the_network_on_the_prepared_photo(classifier: Classifier, trained: Path) -> None:
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


def test_mirrored_answers_are_averaged(classifier: Classifier, trained: Path) -> None:
    pixels = np.stack([preprocess(open_photo(path), classifier.card.preprocessing) for path in paths_of(trained)])
    apart = [classifier.probabilities(np.ascontiguousarray(some)) for some in (pixels, pixels[:, :, ::-1])]
    classifier.card = replace(classifier.card, preprocessing=replace(classifier.card.preprocessing, flip_tta=True))
    np.testing.assert_allclose(classifier.probabilities(pixels), (apart[0] + apart[1]) / 2, atol=1e-6)
    assert abs(apart[0] - apart[1]).max() > 1e-3


def test_one_crop_is_the_prepared_photo_bit_for_bit(classifier: Classifier, trained: Path) -> None:
    """As it was before there were crops: photos prepared, stacked and shown in batches."""
    paths, preprocessing = paths_of(trained), classifier.card.preprocessing
    for mirror in (False, True):
        classifier.card = replace(classifier.card, preprocessing=replace(preprocessing, flip_tta=mirror))
        batches = [
            np.stack([preprocess(open_photo(p), preprocessing) for p in paths[i : i + 8]]) for i in range(0, 36, 8)
        ]
        expected = np.concatenate([classifier.probabilities(batch) for batch in batches])
        for options in ({}, {"crops": 1}):
            found, _ = classifier.classify(paths, batch_size=8, **options)  # type: ignore[arg-type]
            assert found.dtype == np.float32
            assert (found == expected).all()


@pytest.mark.parametrize("number", [10, 144])
def test_the_answers_for_crops_are_averaged(classifier: Classifier, trained: Path, number: Any) -> None:
    """Against the plain way: each crop and each mirror image by itself, in float64."""
    paths = paths_of(trained)[:3]
    found, _ = classifier.classify(paths, crops=number)
    preprocessing = classifier.card.preprocessing
    network = copy.deepcopy(classifier.network).double().eval()
    for path, row in zip(paths, found, strict=True):
        made = tta_crops(open_photo(path), preprocessing, number)
        looks = [look for crop in made for look in (crop, np.fliplr(crop))]
        assert len(looks) == number
        total = np.zeros(3)
        for look in looks:
            image = torch.from_numpy((look / 255 - preprocessing.mean) / preprocessing.std).permute(2, 0, 1)[None]
            with torch.no_grad():
                total += network(image).softmax(1)[0].numpy()
        np.testing.assert_allclose(row, total / number, atol=2e-5)
    alone, _ = classifier.classify(paths)
    assert abs(alone - found).max() > 1e-3


@pytest.mark.parametrize("mirror", [False, True])
def test_the_network_sees_each_crop_once_and_few_at_a_time(classifier: Classifier, trained: Path, mirror: bool) -> None:
    """Whatever the card says of mirror images: they are among the crops."""
    paths, seen = paths_of(trained)[:5], []
    expected, _ = classifier.classify(paths, crops=10)
    classifier.card = replace(classifier.card, preprocessing=replace(classifier.card.preprocessing, flip_tta=mirror))
    classifier.refresh()
    classifier.network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    for batch_size, batches in ((1, [1] * 10 * 5), (3, [3, 3, 2, 2] * 5), (10, [10] * 4 + [5] * 2), (64, [25] * 2)):
        seen.clear()
        found, _ = classifier.classify(paths, crops=10, batch_size=batch_size)
        assert seen == batches
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_crops_of_many_photos_make_folding_worthwhile(classifier: Classifier, trained: Path) -> None:
    classifier.classify(paths_of(trained)[:9], crops=10)
    assert classifier._folded is None
    classifier.classify(paths_of(trained)[:10], crops=10)
    assert classifier._folded is not None


def test_crops_can_be_kept(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    for i, path in enumerate(paths_of(trained)[:3]):
        shutil.copy(path, tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    cache = Cache(3, 10**7)
    first, _ = classifier.classify(paths, crops=144, cache=cache)
    assert cache.used == 3 * 72 * 32 * 32 * 3
    for path in paths:
        Path(path).unlink()
    again, errors = classifier.classify(paths, crops=144, cache=cache)
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
    classifier.classify(paths_of(trained)[:5], crops=144, progress=progress)
    assert (progress.totals, progress.advanced) == ([(5, "photos")], [1] * 5)


def test_numbers_of_crops_that_no_paper_has(classifier: Classifier, trained: Path) -> None:
    with pytest.raises(UsageError, match=r"^crops 5 is not valid: use 1, 10, 144$"):
        classifier.classify(paths_of(trained), crops=5)  # type: ignore[arg-type]


def test_for_many_photos_batch_normalisation_is_folded_away(classifier: Classifier, trained: Path) -> None:
    paths = paths_of(trained)
    before, _ = classifier.classify(paths)
    many, _ = classifier.classify(paths * 3)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in classifier._folded.modules())  # type: ignore[union-attr]
    np.testing.assert_allclose(many[: len(paths)], before, atol=1e-5)
    with torch.no_grad():
        classifier.network.fc.bias[0] += 5
    classifier.refresh()
    after, _ = classifier.classify(paths * 3)
    assert (after[: len(paths), 0] > before[:, 0]).all()


def test_broken_photos_do_not_stop_the_others(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("text")
    good = paths_of(trained)[:3]
    predictions = classifier.predict([good[0], tmp_path / "x.jpg", good[1], tmp_path / "none.jpg", good[2]])
    assert [p.error for p in predictions] == [
        None, "it is not an image that Pillow can read", None, "there is no such file", None,
    ]  # fmt: skip
    assert predictions[1].label is predictions[1].probability is None
    alone = classifier.predict(good)
    assert [p.label for p in predictions if not p.error] == [p.label for p in alone]
    assert classifier.predict([]) == []


def test_what_cannot_be_asked(classifier: Classifier) -> None:
    with pytest.raises(UsageError, match=r"predict takes a list of paths, not one \(a.jpg\): put it in a list"):
        classifier.predict("a.jpg")
    with pytest.raises(UsageError, match="top 0 with batch_size 32 cannot be: both are at least 1"):
        classifier.predict(["a.jpg"], top=0)


def test_a_training_network_is_left_training(classifier: Classifier) -> None:
    classifier.network.train()
    before = {k: v.clone() for k, v in classifier.network.state_dict().items()}
    pixels = np.zeros((2, 32, 32, 3), dtype=np.uint8)
    first = classifier.probabilities(pixels)
    assert classifier.network.training
    assert (first == classifier.probabilities(pixels)).all()  # no dropout, no batch statistics
    assert all(torch.equal(before[k], v) for k, v in classifier.network.state_dict().items())


def test_a_device_that_is_not_there(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="PyTorch finds no cuda device here"):
        Classifier.load(trained / "best.safetensors", device="cuda")
