"""`bnlab machine`: what this machine is, how bnlab uses it, and how fast it multiplies matrices."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from bnlab.machine import choose_device, environment, fast_precision, free_memory
from bnlab.progress import Progress

_SECONDS = 1.0  # for each measurement
_SIDE = 2048


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """What `bnlab machine` is told."""

    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class MachineResult:
    """What was found and measured."""

    environment: dict[str, Any]
    """what a run's environment.json says"""
    free_memory: int
    """bytes of main memory that can still be taken"""
    precision: str
    """what `precision: auto` is here"""
    tuning: str
    """whether the process was prepared for training, or why not"""
    gflops: dict[str, float] = field(default_factory=dict)
    """what was multiplied, to 10^9 operations a second (a multiplication and an addition are two)"""

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab machine --json`."""
        return {
            **self.environment,
            "free_memory": self.free_memory,
            "precision": self.precision,
            "tuning": self.tuning,
            "gflops": {what: round(rate, 1) for what, rate in self.gflops.items()},
        }


def run(settings: MachineSettings, progress: Progress) -> MachineResult:
    """Look at the machine and measure it, in about four seconds.

    Raises:
        UsageError: there is no such device.
    """
    device = choose_device(settings.device)
    found = environment(device)
    kinds = [torch.float32] + [torch.bfloat16] * (fast_precision(device) == "bfloat16")
    works = [(f"{work.__name__}, {str(kind)[6:]}", work, kind) for kind in kinds for work in (product, convolution)]
    gflops = {}
    with progress.task("measuring", len(works), "rates") as task:
        for what, work, kind in works:
            gflops[what] = rate(*work(device, kind), device) / 1e9
            task.advance()
    tuning = (
        "prepared for training" if found["tuned"] else "left as it is (not Linux with glibc, or torch was there before)"
    )
    if os.environ.get("BNLAB_TUNE") == "0":
        tuning = "left as it is (BNLAB_TUNE=0)"
    return MachineResult(
        environment=found,
        free_memory=free_memory(),
        precision=fast_precision(device),
        tuning=tuning,
        gflops=gflops,
    )


def product(device: str, kind: torch.dtype) -> tuple[Callable[[], object], float]:
    """A square matrix product as work to be done, and its operations."""
    a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=kind) for _ in range(2))
    return lambda: a @ b, 2.0 * _SIDE**3


def convolution(device: str, kind: torch.dtype) -> tuple[Callable[[], object], float]:
    """A 1 x 1 convolution, which is a matrix product by another library, as work to be done, and its operations."""
    images = torch.randn(32, 512, 28, 28, device=device, dtype=kind).to(memory_format=torch.channels_last)
    filters = torch.randn(512, 512, 1, 1, device=device, dtype=kind).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(images, filters), 2.0 * 32 * 28 * 28 * 512 * 512


def rate(work: Callable[[], object], operations: float, device: str = "cpu") -> float:
    """Operations a second, by the median of as many trials as fit into a second."""
    times: list[float] = []
    began = time.perf_counter()
    with torch.inference_mode():
        work()
        while not times or time.perf_counter() - began < _SECONDS:
            _wait(device)
            start = time.perf_counter()
            work()
            _wait(device)
            times.append(time.perf_counter() - start)
    return operations / median(times)


def _wait(device: str) -> None:
    if device != "cpu":
        getattr(torch, device).synchronize()
