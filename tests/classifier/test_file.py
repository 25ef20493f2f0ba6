import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from bnlab.classifier.file import (
    FORMAT_VERSION,
    Card,
    from_json,
    load_network,
    read_classifier,
    save_classifier,
    to_json,
)
from bnlab.classifier.seen import Ancestor, SeenPhotos
from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import Preprocessing
from bnlab.errors import ClassifierError, UsageError
from bnlab.nets import build

CARD = Card(
    network="bn_googlenet",
    arguments={"dropout": 0.2},
    classes=("rose", "百合", 'a "b"'),
    preprocessing=Preprocessing(size=96, resize="crop", crop_fraction=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    metrics={"split": "val", "n": 12, "top1": 0.5},
)


def test_a_card_is_the_same_after_a_round_trip() -> None:
    assert from_json(to_json(CARD), "x") == CARD


def test_a_card_keeps_what_was_seen_and_an_older_one_does_not_say() -> None:
    split = Photos.of([Photo("private/a.jpg", "rose", "train", "ab" * 32), Photo("b", "rose", "val", "cd" * 32)])
    earlier = Ancestor(split_sha256="12" * 32, photos={"train": 9}, classes=("rose", "oak"))
    card = replace(CARD, seen=SeenPhotos.of(split), ancestors=(earlier,), photos={"train": 1, "val": 1, "test": 0})
    text = to_json(card)
    assert from_json(text, "x") == card
    assert "private" not in text
    values = json.loads(text)
    for key in ("seen", "ancestors", "photos"):
        del values[key]
    assert from_json(json.dumps(values), "x").seen == SeenPhotos(complete=False)


def test_a_newer_format_is_refused() -> None:
    newer = json.dumps(json.loads(to_json(CARD)) | {"format": FORMAT_VERSION + 1, "hologram": True})
    with pytest.raises(
        ClassifierError, match=r"x.safetensors was written by a newer bnlab .*format 3.*: upgrade bnlab"
    ):
        from_json(newer, "x.safetensors")


def test_format_1_is_refused_by_name() -> None:
    """It had "view" for "preprocessing" and "mirror" for "flip_tta"."""
    values = json.loads(to_json(CARD))
    values |= {"format": 1, "view": values.pop("preprocessing")}
    with pytest.raises(ClassifierError) as error:
        from_json(json.dumps(values), "x.safetensors")
    assert str(error.value) == (
        "x.safetensors was written by an older bnlab (classifier format 1, this bnlab reads format 2): train it again"
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": 2}', '{"format": "x"}', '{"format": 2, "preprocessing": 3}']
)
def test_what_is_not_a_card_is_refused(text: str) -> None:
    with pytest.raises(ClassifierError, match=r"x has a card that cannot be read .*: train or copy it again"):
        from_json(text, "x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arguments": {"dropout": [0.2]}}, "arguments.dropout.str: input should be a valid string"),
        ({"classes": ["a", 3, "c"]}, "classes.1: input should be a valid string"),
        ({"classes": ["a", "a"]}, "its classes are not distinct"),
        ({"classes": []}, "classes: tuple should have at least 1 item"),
        ({"format": 0}, "format 0"),
        ({"seen": {"train": "AAAA"}}, "seen.train: value error, it must be base64 of 8 bytes a photo"),
        ({"ancestors": [{}]}, "ancestors.0.classes: field required"),
        ({"preprocessing": {"resize": "letterbox"}}, "preprocessing.resize: input should be 'squash' or 'crop'"),
        ({"preprocessing": {"size": "big"}}, "preprocessing.size: input should be a valid integer"),
        ({"preprocessing": {"mean": [0.5, 0.5]}}, "preprocessing.mean.2: field required"),
        ({"preprocessing": {"std": [0.5, 0.5, 0]}}, "preprocessing.std.2: input should be greater than 0"),
        (
            {"preprocessing": {"pixel_range": [9, 1]}},
            "preprocessing.pixel_range: value error, its first",
        ),
        ({"preprocessing": {"interpolation": "lanczos"}}, "preprocessing.interpolation: input should be 'bilinear'"),
    ],
)
def test_a_card_with_a_wrong_value_is_refused(change: dict[str, object], reason: str) -> None:
    values = json.loads(to_json(CARD))
    for key, value in change.items():
        values[key] = values[key] | value if key == "preprocessing" else value
    with pytest.raises(ClassifierError) as error:
        from_json(json.dumps(values), "x")
    assert str(error.value).startswith(f"x has a card that cannot be read ({reason}")


def test_the_pixel_range_is_kept_and_files_from_before_it_have_none() -> None:
    ranged = replace(CARD, preprocessing=replace(CARD.preprocessing, pixel_range=(-1.5, 4095.0)))
    assert from_json(to_json(ranged), "x") == ranged
    values = json.loads(to_json(CARD))
    del values["preprocessing"]["pixel_range"]
    assert from_json(json.dumps(values), "x") == CARD


def test_unknown_keys_are_ignored() -> None:
    values = json.loads(to_json(CARD)) | {"date": "2031-01-01"}
    values["preprocessing"] |= {"colour_space": "sRGB"}
    assert from_json(json.dumps(values), "x") == CARD


def refusal(path: Path) -> str:
    with pytest.raises(ClassifierError) as error:
        load_network(path)
    return str(error.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "best.safetensors"
    save_classifier(path, build("bn_googlenet", classes=3, auxiliary=True, dropout=0.2), CARD)
    return path


def test_a_classifier_is_saved_without_its_auxiliary_heads(saved: Path) -> None:
    network, card = load_network(saved)
    assert card == CARD
    assert not network.training
    assert not [name for name in network.state_dict() if name.startswith("aux")]
    tensors, _ = read_classifier(saved)
    own = build("bn_googlenet", classes=3, auxiliary=True, dropout=0.2).inference_state()
    assert tensors.keys() == own.keys()
    assert all(torch.equal(tensors[name], own[name]) for name in own)


def test_the_same_classifier_gives_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    save_classifier(tmp_path / "again", build("bn_googlenet", classes=3, auxiliary=True, dropout=0.2), CARD)
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_files_that_are_not_classifiers(saved: Path, tmp_path: Path) -> None:
    assert refusal(tmp_path / "none") == f"there is no classifier file {tmp_path / 'none'}: check the path"
    assert f"{tmp_path} is a folder" in refusal(tmp_path)
    assert "folder with best.safetensors" in refusal(tmp_path)
    whole = saved.read_bytes()
    for length in (0, 5, 1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:length])
        assert refusal(tmp_path / "cut").startswith(f"{tmp_path / 'cut'} is not a complete classifier file (")
    (tmp_path / "photo").write_bytes(b"\xff\xd8\xff\xe0" * 100)
    assert "is not a complete classifier file" in refusal(tmp_path / "photo")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path / "pipe") == f"{tmp_path / 'pipe'} is not a regular file: pass a regular file"


def test_a_normalisation_that_a_card_cannot_name_is_refused(tmp_path: Path) -> None:
    network = build("mlp", classes=3, norm=nn.LayerNorm)
    with pytest.raises(UsageError, match=r"normalisation of your own .*state_dict"):
        save_classifier(tmp_path / "x", network, CARD)
    assert not (tmp_path / "x").exists()


def test_a_half_precision_file_gives_a_single_precision_network(tmp_path: Path) -> None:
    network = build("mlp", classes=3)
    save_classifier(tmp_path / "x", network.half(), replace(CARD, network="mlp", arguments=network.arguments))
    loaded, _ = load_network(tmp_path / "x")
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert all(p.requires_grad for p in loaded.parameters())


def test_terminal_codes_in_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    network = build("mlp", classes=3)
    card = replace(CARD, network="mlp", arguments=network.arguments)
    tensors = network.state_dict() | {"\x1b[31mred": torch.zeros(1)}
    (tmp_path / "x").write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(card)}))
    assert "\\x1b[31mred" in refusal(tmp_path / "x")
    values = json.loads(to_json(card))
    values["arguments"]["\x1b[31m"] = [1]
    (tmp_path / "x").write_bytes(safetensors.torch.save(network.state_dict(), {"bnlab": json.dumps(values)}))
    assert "\x1b" not in refusal(tmp_path / "x")


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (tmp_path / "sprung",))  # type: ignore[return-value]

    torch.save({"a": Trap()}, tmp_path / "x.pth")
    assert re.search("x.pth is a pickle, which can run code .*bnlab import", refusal(tmp_path / "x.pth"))
    torch.save({"a": Trap()}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "is a pickle" in refusal(tmp_path / "old.pth")
    assert not (tmp_path / "sprung").exists()


def test_a_header_whose_length_begins_like_a_pickle_is_not_one(tmp_path: Path) -> None:
    """One file in 32 has a header of 128 bytes more than a multiple of 256."""
    contents = (safetensors.torch.save({"a": torch.zeros(2)}, {"x": "x" * length}) for length in range(256))
    (tmp_path / "x.safetensors").write_bytes(next(content for content in contents if content[:1] == b"\x80"))
    assert "holds weights but no bnlab card" in refusal(tmp_path / "x.safetensors")


def test_weights_without_a_card(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert "holds weights but no bnlab card" in refusal(tmp_path / "x.safetensors")


def test_a_mismatch_names_the_tensor(tmp_path: Path) -> None:
    good = build("bn_googlenet", classes=3, dropout=0.2).inference_state()

    def refusal_of(tensors: dict[str, torch.Tensor]) -> str:
        path = tmp_path / "x"
        path.write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(CARD)}))
        return refusal(path)

    assert "lacks the tensor conv1.conv.weight of bn_googlenet" in refusal_of(
        {name: t for name, t in good.items() if name != "conv1.conv.weight"}
    )
    assert "has a tensor extra, which bn_googlenet does not have" in refusal_of(good | {"extra": torch.zeros(1)})
    wrong = refusal_of(good | {"fc.bias": torch.zeros(4)})
    assert re.search(r"the tensor fc.bias of .*x has the shape \[4\], and bn_googlenet needs \[3\]", wrong)
