"""Which other ways to run a network are tried, and how."""

import functools
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from bnlab.health.gather.parity import Parity
from tests.health.checks.networks import sound_network, teacher_batches


def parities(network: nn.Module, *backends: str) -> tuple[dict[str, Parity], tuple[str, ...]]:
    report = health.diagnose(network, teacher_batches(sound_network()), backends=backends)
    return {one.way: one for one in report.evidence.parts.get("backends", ())}, report.notes


def test_each_way_runs_as_it_says() -> None:
    class Seen(nn.Module):
        calls: list[tuple[torch.dtype, bool]] = []  # noqa: RUF012

        def forward(self, x: Tensor) -> Tensor:
            self.calls.append((x.dtype, x.is_contiguous(memory_format=torch.channels_last)))
            return x

    found, _ = parities(nn.Sequential(Seen(), *sound_network()).eval(), "channels_last", "bfloat16", "float16")
    assert [*found] == ["channels_last", "bfloat16", "float16"]
    assert (torch.float32, True) in Seen.calls
    assert {torch.bfloat16, torch.float16} <= {dtype for dtype, _ in Seen.calls}


def test_half_precision_is_judged_by_its_own_tolerance() -> None:
    found, _ = parities(sound_network(), "bfloat16", "channels_last")
    assert not found["bfloat16"].exact
    assert found["channels_last"].exact
    assert found["bfloat16"].tolerance == 0.25 > found["channels_last"].tolerance


def test_compile_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    found, notes = parities(sound_network(), "compile")
    assert (len(compiled), notes) == (1, ())
    assert found["compile"].exact


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is not None, reason="ONNX Runtime is installed")
def test_a_package_that_is_not_installed_is_a_note() -> None:
    found, notes = parities(sound_network(), "onnx")
    assert found == {}
    assert any(note.startswith("onnx was not checked") for note in notes)


def test_no_backends_at_all() -> None:
    assert parities(sound_network()) == ({}, ())
