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
    now = iter([0.0, *(t for i in range(100) for t in (i, i + 0.5, i + 0.6))])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(now))
    assert machine.rate(lambda: None, 1e9) == pytest.approx(2e9)


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
    assert run(MachineOptions(device="cpu"), NullProgress()).tuning == "left as it is (BNLAB_TUNE=0)"
    with pytest.raises(UsageError):
        run(MachineOptions(device="tpu"), NullProgress())
