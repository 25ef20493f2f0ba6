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


def test_a_card_survives() -> None:
    assert from_json(to_json(CARD), "x") == CARD


def test_a_newer_format_is_refused() -> None:
    newer = json.dumps(json.loads(to_json(CARD)) | {"format": FORMAT_VERSION + 1, "hologram": True})
    with pytest.raises(ClassifierError) as error:
        from_json(newer, "x.safetensors")
    assert str(error.value) == "x.safetensors has classifier format 2, and this bnlab reads up to 1: upgrade bnlab"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": "x"}', '{"format": 1, "view": 3}'])
def test_what_is_no_card_is_refused(text: str) -> None:
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
        ({"view": {"resize": "letterbox"}}, "view.resize: input should be 'squash' or 'crop'"),
        ({"view": {"size": "big"}}, "view.size: input should be a valid integer"),
        ({"view": {"mean": [0.5, 0.5]}}, "view.mean.2: field required"),
        ({"view": {"std": [0.5, 0.5, 0]}}, "view.std.2: input should be greater than 0"),
        ({"view": {"interpolation": "lanczos"}}, "view.interpolation: input should be 'bilinear'"),
    ],
)
def test_a_card_out_of_bounds_is_refused(change: dict[str, object], reason: str) -> None:
    values = json.loads(to_json(CARD))
    for key, value in change.items():
        values[key] = values[key] | value if key == "view" else value
    with pytest.raises(ClassifierError) as error:
        from_json(json.dumps(values), "x")
    assert str(error.value).startswith(f"x has a card that cannot be read ({reason}")


def test_keys_of_later_versions_are_passed_over() -> None:
    values = json.loads(to_json(CARD)) | {"date": "2031-01-01"}
    values["view"] |= {"colour_space": "sRGB"}
    assert from_json(json.dumps(values), "x") == CARD
