import json

import pytest

from bnlab.classifier.card import FORMAT_VERSION, Card, from_json, to_json
from bnlab.data.pixels import View
from bnlab.errors import ClassifierError

CARD = Card(
    network="bn_googlenet",
    arguments={"dropout": 0.2},
    classes=("rose", "百合", 'a "b"'),
    view=View(size=96, resize="crop", crop_fraction=0.9, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)),
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
