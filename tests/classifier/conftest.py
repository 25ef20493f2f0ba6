from pathlib import Path

import pytest

from bnlab import Classifier


@pytest.fixture
def classifier(trained: Path) -> Classifier:
    return Classifier.load(trained / "best.safetensors")
