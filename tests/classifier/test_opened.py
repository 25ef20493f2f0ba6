"""Opening what a verb takes as MODEL, and writing its like."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bnlab.classifier.file import load_network
from bnlab.classifier.opened import (
    OpenedModel,
    check_classes,
    check_output,
    is_code,
    measured_on,
    open_model,
    save_model,
)
from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import Preprocessing
from bnlab.errors import ClassifierError, UsageError
from bnlab.options import ModelOptions


def opened(network: nn.Module) -> OpenedModel:
    preprocessing = Preprocessing(size=8, resize="crop", crop_fraction=1.0, mean=(0.5,) * 3, std=(0.5,) * 3)
    return OpenedModel(name="net.py:make", network=network, classes=None, preprocessing=preprocessing)


def test_a_path_with_a_colon_that_exists_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    assert not is_code(str(tmp_path / "a:b"))
    assert is_code("net.py:make")
    assert not is_code("best.safetensors")


def test_a_classifier_is_written_as_one(trained: Path, tmp_path: Path) -> None:
    model = open_model(ModelOptions(model=str(trained)))
    save_model(tmp_path / "new" / "f.safetensors", model, model.network, model.card)
    network, card = load_network(tmp_path / "new" / "f.safetensors")
    assert card == model.card
    assert all(torch.equal(value, model.network.state_dict()[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_shared_weight_is_written_under_each_name(tmp_path: Path, name: str) -> None:
    network = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    network[1].weight = network[0].weight
    save_model(tmp_path / name, opened(network), network, None)
    path = tmp_path / name
    found = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
    assert torch.equal(found["0.weight"], network[0].weight)
    assert torch.equal(found["1.weight"], network[0].weight)


class WithState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"epoch": 3}

    def set_extra_state(self, state: object) -> None: ...


class Identity(nn.Module):
    """With a layer that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_is_no_tensor_needs_a_pickle(tmp_path: Path) -> None:
    network = WithState(2, 2)
    with pytest.raises(UsageError, match=r"_extra_state of net.py:make is not a tensor.*\.pt"):
        save_model(tmp_path / "w.safetensors", opened(network), network, None)
    save_model(tmp_path / "w.pt", opened(network), network, None)
    assert torch.load(tmp_path / "w.pt", weights_only=True)["_extra_state"] == {"epoch": 3}


def test_names_of_outputs(tmp_path: Path) -> None:
    check_output(tmp_path / "w.pth", "net.py:make", "--output")
    for path, model in ((tmp_path / "w.bin", "net.py:make"), (tmp_path / "w.pt", "best.safetensors")):
        with pytest.raises(UsageError, match="such a name to --output"):
            check_output(path, model, "--output")
    (tmp_path / "link.pt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"link\.pt exists already"):
        check_output(tmp_path / "link.pt", "net.py:make", "--output")


def test_classes_have_to_be_those_of_the_network(tmp_path: Path) -> None:
    photos = Photos.of([Photo("a.png", "ring"), Photo("b.png", "disc")])

    def network(outputs: int) -> nn.Module:
        """Its output is not that of the last module that it lists."""
        return nn.Sequential(nn.Conv2d(3, outputs, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Identity())

    check_classes(tmp_path, photos, ("disc", "ring"), opened(network(2)))
    with pytest.raises(ClassifierError, match=r"does not know \(disc\)"):
        check_classes(tmp_path, photos, ("ring",), opened(network(2)))
    with pytest.raises(ClassifierError, match=r"3 outputs, but .* has 2 classes"):
        check_classes(tmp_path, photos, ("disc", "ring"), opened(network(3)))


def test_photos_that_were_measured_on_count_as_seen(trained: Path, tmp_path: Path) -> None:
    card = open_model(ModelOptions(model=str(trained))).card
    assert card is not None
    (tmp_path / "a.png").write_bytes(b"a photo")
    (photo,) = photos = Photos.of([Photo(str(tmp_path / "a.png"), "ring", "val")])
    after = measured_on(card, photos, {"n": 1})
    assert after.metrics == {"n": 1}
    assert len(after.seen.prefixes("train")) == len(card.seen.prefixes("train")) + 1
    assert photo.split == "val"
