import json
from collections.abc import Callable

import pytest
import torch

from bnlab.commands import machine
from bnlab.commands.machine import run
from bnlab.errors import UsageError
from bnlab.options import MachineOptions
from bnlab.progress import NullProgress
from tests.conftest import Outcome


def test_rates_are_operations_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "seconds", lambda work: 0.5)
    monkeypatch.setattr(machine, "fast_precision", lambda device: "bfloat16")
    gflops = run(MachineOptions(device="cpu"), NullProgress())["gflops"]
    works = [f"{work}, {dtype}" for dtype in ("float32", "bfloat16") for work in ("product", "convolution")]
    assert gflops == dict(zip(works, [34.4, 26.3] * 2, strict=True))  # 2 * 2048^3 and 2 * 32 * 28^2 * 512^2, by 0.5e9


def test_the_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    calls: list[None] = []
    assert machine.seconds(lambda: calls.append(None)) > 0
    assert calls


def test_what_is_multiplied_is_what_is_counted() -> None:
    for work in (machine.product, machine.convolution):
        done, operations = work("cpu", torch.float32)
        result = done()
        assert isinstance(result, torch.Tensor)
        inner = 2048 if work is machine.product else 512
        assert operations == 2 * result.numel() * inner


def test_the_verb_prints_what_was_found(bnlab: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.01)
    document = json.loads(bnlab("machine", "--json").out)
    assert document["device"] in ("cpu", "cuda", "mps")
    assert document["gflops"]["product, float32"] > 0
    assert document["precision"] in ("float32", "bfloat16")
    shown = bnlab("machine", "--device", "cpu")
    assert shown.status == 0
    assert "convolution, float32" in shown.out
    assert "free memory" in shown.out
    assert "--device" in bnlab("machine", "--device", "gpu").complaint


def test_it_says_why_it_left_the_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.0)
    monkeypatch.setenv("BNLAB_TUNE", "0")
    assert run(MachineOptions(device="cpu"), NullProgress())["tuning"] == "left as it is (BNLAB_TUNE=0)"
    with pytest.raises(UsageError):
        run(MachineOptions(device="tpu"), NullProgress())
