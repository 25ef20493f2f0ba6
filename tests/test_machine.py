import json

import pytest
import torch

from bnlab.errors import UsageError
from bnlab.machine import choose_device, environment, usable_cores, versions


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="PyTorch finds no cuda device here: say --device cpu, or auto"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="there is no device called 'gpu': did you mean 'cpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"


def test_environment_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(json.dumps(environment("cpu")))
    assert document["versions"]["torch"] == torch.__version__ == versions()["torch"]
    assert document["cores"] == usable_cores() >= 1
