import copy
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bnlab import Classifier, nets, norm
from bnlab.classifier.predict import classify
from bnlab.data.cache import Cache
from bnlab.data.photo_file import open_photo
from bnlab.data.preprocess import preprocess, tta_crops
from bnlab.errors import ClassifierError, StorageError, UsageError
from bnlab.progress import NullProgress, Task


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


def test_warnings_reach_logging_without_a_progress(classifier: Classifier, caplog: pytest.LogCaptureFixture) -> None:
    classifier.predict(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("bnlab", "WARNING")
    assert "the largest value is 200" in record.getMessage()


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


def weights_in_place(classifier: Classifier) -> None:
    with torch.no_grad():
        classifier.network.fc.bias[0] += 5


def weights_past_autograd(classifier: Classifier) -> None:
    classifier.network.fc.bias.data[0] += 5  # which moves no version counter


def loaded_state(classifier: Classifier) -> None:
    state = classifier.network.state_dict()
    classifier.network.load_state_dict({k: v + 0.5 * v.abs() if v.is_floating_point() else v for k, v in state.items()})


def another_network(classifier: Classifier) -> None:
    classifier.network = copy.deepcopy(classifier.network)
    weights_in_place(classifier)


def running_statistics(classifier: Classifier) -> None:
    classifier.network.get_submodule("conv1.bn").running_mean += 1


def statistics_of_the_batch(classifier: Classifier) -> None:
    for layer in classifier.network.modules():
        if isinstance(layer, norm.BatchNorm2d):
            layer.statistics = "batch"


def a_layer(classifier: Classifier) -> None:
    classifier.network.fc = torch.nn.Linear(classifier.network.fc.in_features, 3)


@pytest.mark.parametrize(
    "change",
    [
        weights_in_place,
        weights_past_autograd,
        loaded_state,
        another_network,
        running_statistics,
        statistics_of_the_batch,
        a_layer,
    ],
)
def test_a_changed_network_gives_other_answers(
    classifier: Classifier, trained: Path, change: Callable[[Classifier], None]
) -> None:
    """For as many photos as were once answered by a folded copy of the network."""
    paths = paths_of(trained)[::4] * 12
    assert len(paths) >= 100
    before = classifier.predict(paths, batch_size=64)
    assert classifier.predict(paths, batch_size=64) == before
    change(classifier)
    after = classifier.predict(paths, batch_size=64)
    assert all(one != other for one, other in zip(before, after, strict=True))
    fresh = Classifier(copy.deepcopy(classifier.network), classifier.card)
    assert fresh.predict(paths, batch_size=64) == after


def test_threads_get_the_answers_of_one_thread(classifier: Classifier, trained: Path) -> None:
    """Eight at once, each with its share of a hundred photos or more: two classifiers, one in training mode."""
    paths = paths_of(trained)[::4] * 12
    other = Classifier(copy.deepcopy(classifier.network), classifier.card)
    expected = classifier.predict(paths)
    pixels = np.stack([np.asarray(open_photo(path)) for path in paths[:9]])
    probabilities = classifier.predict_proba(pixels)
    other.network.train()
    other.network.get_submodule("conv1").eval()
    start = threading.Barrier(8)

    def predicted(i: int) -> bool:
        mine = other if i % 2 else classifier
        start.wait()
        if i < 4:
            return mine.predict(paths) == expected
        return all((mine.predict_proba(pixels) == probabilities).all() for _ in range(4))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(predicted, range(8)))
    assert other.network.training
    assert not other.network.get_submodule("conv1").training
    assert not classifier.network.training


def test_other_modules_run_while_a_hundred_photos_are_classified(classifier: Classifier, trained: Path) -> None:
    """torch.fx, by which batch normalisation could be folded, makes them fail while it traces."""
    model, stop = torch.nn.Sequential(torch.nn.Linear(2, 2)), threading.Event()

    def run() -> int:
        calls = 0
        while not stop.is_set():
            model(torch.zeros(1, 2))
            calls += 1
        return calls

    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(run)
        classifier.predict(paths_of(trained)[::4] * 12)
        stop.set()
        assert calls.result() > 0


def test_a_network_in_training_mode_is_not_touched(classifier: Classifier, trained: Path) -> None:
    """Its hooks are called all the same, and its weights are not copied."""
    seen: list[torch.nn.Module] = []
    pixels = np.zeros((2, 40, 40, 3), np.uint8)
    expected = classifier.predict_proba(pixels)
    network = classifier.network.train()
    network.fc.register_forward_hook(lambda module, *_: seen.append(module))
    assert (classifier.predict_proba(pixels) == expected).all()
    assert len(seen) == 1
    assert seen[0] is not network.fc
    assert seen[0].weight is network.fc.weight
    assert all(module.training for module in network.modules())


# Photos in memory.


@pytest.mark.parametrize("number", [0, 1, 5])
def test_arrays_and_tensors_get_the_answers_of_photos(classifier: Classifier, trained: Path, number: int) -> None:
    paths = paths_of(trained)[:number]
    pixels = np.array([np.asarray(open_photo(path)) for path in paths], np.uint8).reshape(number, 40, 40, 3)
    (expected,), _ = classify([classifier], paths, batch_size=2)
    for batch in (pixels, torch.from_numpy(pixels), np.asfortranarray(pixels)):
        found = classifier.predict_proba(batch, batch_size=2)
        assert found.shape == (number, 3)
        assert found.dtype == np.float32
        assert (found == expected).all()


def test_photos_in_memory_have_any_size(classifier: Classifier) -> None:
    found = classifier.predict_proba(np.zeros((2, 17, 90, 3), np.uint8))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "fragments"),
    [
        (np.zeros((32, 32, 3), np.uint8), ["32 x 32 x 3", "photo[None]"]),
        (np.zeros((2, 3, 32, 32), np.uint8), ["2 x 3 x 32 x 32", "permute(0, 2, 3, 1)"]),
        (np.zeros((2, 32, 32, 1), np.uint8), ["2 x 32 x 32 x 1", "N x H x W x 3"]),
        (np.zeros((2, 0, 32, 3), np.uint8), ["2 x 0 x 32 x 3"]),
        (np.uint8(3), ["uint8", "array or a tensor"]),
        (np.zeros((2, 32, 32, 3)), ["float64", "uint8"]),
        (torch.zeros(2, 32, 32, 3), ["torch.float32", "uint8"]),
        ([[1]], ["list", "array or tensor"]),
    ],
)
def test_other_batches_are_refused(classifier: Classifier, batch: Any, fragments: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        classifier.predict_proba(batch)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_photos_in_memory_need_sound_weights_and_numbers(classifier: Classifier) -> None:
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UsageError, match="batch_size 0"):
        classifier.predict_proba(pixels, batch_size=0)
    classifier.network.fc.bias.data.fill_(float("nan"))
    with pytest.raises(ClassifierError, match="not finite"):
        classifier.predict_proba(pixels)


# Files, copies and text.


def test_saving_keeps_the_present_weights_to_the_bit(classifier: Classifier, trained: Path, tmp_path: Path) -> None:
    weights_in_place(classifier)
    path = tmp_path / "new" / "a.safetensors"
    classifier.save(path)
    again = Classifier.load(path)
    assert again.card == classifier.card
    state = classifier.network.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.network.state_dict().items())
    assert again.predict(paths_of(trained)[:3]) == classifier.predict(paths_of(trained)[:3])
    again.save(tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_nothing_is_overwritten(classifier: Classifier, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("mine")
    with pytest.raises(UsageError, match=r"a\.safetensors exists already: pass a new file"):
        classifier.save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    with pytest.raises(UsageError, match=r"does not end in \.safetensors"):
        classifier.save(tmp_path / "a.pt")
    with pytest.raises(StorageError):
        classifier.save(tmp_path / "a.safetensors" / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_network_that_no_card_describes_is_not_saved(classifier: Classifier, tmp_path: Path) -> None:
    classifier.network.fc = torch.nn.Linear(classifier.network.fc.in_features, 4)
    with pytest.raises(UsageError, match=r"fc.weight .*shape \[4, .* for 3 classes"):
        classifier.save(tmp_path / "a.safetensors")
    classifier.network = torch.nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(UsageError, match="a Linear of your own cannot be saved"):
        classifier.save(tmp_path / "a.safetensors")


def test_another_network_is_saved_as_what_it_is(classifier: Classifier, tmp_path: Path) -> None:
    classifier.network = nets.build("bn_mlp", classes=3).eval()
    classifier.save(tmp_path / "a.safetensors")
    again = Classifier.load(tmp_path / "a.safetensors")
    assert again.card.network == "bn_mlp"
    pixels = np.full((1, 32, 32, 3), 7, np.uint8)
    assert (again.predict_proba(pixels) == classifier.predict_proba(pixels)).all()


def test_a_classifier_of_one_class_has_one_class(classifier: Classifier) -> None:
    network = nets.build("bn_mlp", classes=1).eval()
    assert ", 1 class, " in repr(Classifier(network, replace(classifier.card, classes=("all",))))


def test_the_folder_of_a_run_is_its_best_classifier(classifier: Classifier, trained: Path) -> None:
    again = Classifier.load(trained)
    assert again.path == classifier.path == trained / "best.safetensors"
    with pytest.raises(ClassifierError, match="is a folder"):
        Classifier.load(trained.parent)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_copies_answer_alike(classifier: Classifier, trained: Path, duplicate: Callable[[Any], Any]) -> None:
    assert duplicate(classifier).predict(paths_of(trained)[:2]) == classifier.predict(paths_of(trained)[:2])


def test_its_text_says_what_it_is(classifier: Classifier, trained: Path) -> None:
    shown = f"bn_small_inception, 3 classes, 32 px, on {classifier.device}"
    assert repr(classifier) == f"<Classifier {shown}, from {trained / 'best.safetensors'}>"
    classifier.network.to("meta")
    assert repr(Classifier(classifier.network, classifier.card)) == f"<Classifier {shown[:-3]}meta>"


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
    (dark,) = classifier.predict(tmp_path / "16.png", progress=progress)
    assert progress.warnings[0].endswith("train with pixel_range=255")
    preprocessing = replace(classifier.card.preprocessing, pixel_range=(0.0, 255.0))
    ranged = Classifier(classifier.network, replace(classifier.card, preprocessing=preprocessing))
    plain, deep = ranged.predict([tmp_path / "8.png", tmp_path / "16.png"])
    assert plain.top == deep.top != dark.top
    both, _ = classify([classifier, ranged], [str(tmp_path / "16.png")])
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
