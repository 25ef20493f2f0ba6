from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bnlab import Classifier
from bnlab.data.pixels import open_photo, prepare
from bnlab.errors import UsageError


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
    view = classifier.card.view
    pixels = prepare(open_photo(path), view).astype(float) / 255
    image = torch.from_numpy((pixels - view.mean) / view.std).permute(2, 0, 1)[None]
    with torch.no_grad():
        expected = classifier.network.double().eval()(image).softmax(1)[0]
    classifier.network.float()
    predicted = {c.label: c.probability for c in classifier.predict([path], top=3)[0].top}
    assert [predicted[label] for label in classifier.classes] == pytest.approx(expected.tolist(), abs=1e-5)


def test_mirrored_answers_are_averaged(classifier: Classifier, trained: Path) -> None:
    pixels = np.stack([prepare(open_photo(path), classifier.card.view) for path in paths_of(trained)])
    apart = [classifier.probabilities(np.ascontiguousarray(some)) for some in (pixels, pixels[:, :, ::-1])]
    classifier.card = replace(classifier.card, view=replace(classifier.card.view, mirror=True))
    np.testing.assert_allclose(classifier.probabilities(pixels), (apart[0] + apart[1]) / 2, atol=1e-6)
    assert abs(apart[0] - apart[1]).max() > 1e-3


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
        None, "it is no picture Pillow can read", None, "there is no such file", None,
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
