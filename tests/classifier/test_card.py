import json

import pytest

from bnlab.classifier.card import FORMAT_VERSION, Card, from_json, to_json
from bnlab.data.preprocess import Preprocessing
from bnlab.errors import ClassifierError

CARD = Card(
    network="bn_googlenet",
    arguments={"dropout": 0.2},
    classes=("rose", "百合", 'a "b"'),
    preprocessing=Preprocessing(size=96, resize="crop", crop_fraction=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
    metrics={"split": "val", "n": 12, "top1": 0.5},
)


def test_a_card_is_the_same_after_a_round_trip() -> None:
    assert from_json(to_json(CARD), "x") == CARD


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
        ({"preprocessing": {"resize": "letterbox"}}, "preprocessing.resize: input should be 'squash' or 'crop'"),
        ({"preprocessing": {"size": "big"}}, "preprocessing.size: input should be a valid integer"),
        ({"preprocessing": {"mean": [0.5, 0.5]}}, "preprocessing.mean.2: field required"),
        ({"preprocessing": {"std": [0.5, 0.5, 0]}}, "preprocessing.std.2: input should be greater than 0"),
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


def test_unknown_keys_are_ignored() -> None:
    values = json.loads(to_json(CARD)) | {"date": "2031-01-01"}
    values["preprocessing"] |= {"colour_space": "sRGB"}
    assert from_json(json.dumps(values), "x") == CARD
