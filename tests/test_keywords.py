"""The types of the keyword arguments, as mypy reads them. (tests/test_docs.py checks that the file is current.)"""

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from bnlab import keywords
from bnlab.options import TrainOptions
from bnlab.recipe import Recipe

CONSUMER = """\
from pathlib import Path

import bnlab
from bnlab import BnlabError, Classifier, Refusal, errors

bnlab.train("data", epochs=2, time="20m", precision="auto", init=Path("a.safetensors"), crop_area=(0.1, 1))
bnlab.train("data", epochs="x")  # E
bnlab.train("data", epoch=2)  # E
bnlab.train("data", optimizer="lion")  # E
bnlab.find_lr("data", size=32, name="a")
bnlab.split("photos", Path("data"), how="list", vall=0.1)  # E
bnlab.resume("train", device="cpu", epochs=3, size=32)  # E
bnlab.import_weights("a.pth", "b.safetensors", width=0.5, learning_rate=1.0)  # E
bnlab.study("placement", seeds=3, steps=10, ema=0.5)  # E
classifier: Classifier = bnlab.train("data").classifier
top1: float = bnlab.evaluate([classifier, "a.safetensors"], "data", crops=10).evaluation.top1
bnlab.evaluate(classifier, "data", crops=5)  # E
label: str | None = bnlab.predict(classifier, ["a.jpg"], top=2)[0].label
refused: tuple[Refusal, ...] = bnlab.split("photos", "data").refused
try:
    classifier.save(3)  # E
except errors.UsageError as error:
    assert isinstance(error, BnlabError)
"""


def test_the_keywords_of_a_training_are_those_of_its_options_and_its_recipe() -> None:
    hints = get_type_hints(keywords.Train)
    assert hints.keys() == (TrainOptions.model_fields.keys() | Recipe.model_fields.keys()) - {"data", "recipe_keys"}
    assert hints["epochs"] is int
    assert hints["time"] == float | str | None
    assert not keywords.Train.__required_keys__


@pytest.mark.slow
def test_mypy_finds_what_is_not_valid(tmp_path: Path) -> None:
    (tmp_path / "consumer.py").write_text(CONSUMER)
    words = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--cache-dir", "cache", "consumer.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error: " in line}
    assert found == {i for i, line in enumerate(CONSUMER.splitlines(), 1) if line.endswith("# E")}, done.stdout
