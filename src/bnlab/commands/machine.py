"""`bnlab machine`: describe this machine, how bnlab uses it, and how fast it multiplies matrices."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from bnlab.machine import choose_device, environment, fast_precision, free_memory
from bnlab.options import MachineOptions
from bnlab.progress import Progress

_SECONDS = 1.0  # of each measurement
_MATRIX = 2048  # rows and columns


@dataclass(frozen=True, kw_only=True)
class MachineResult:
    environment: dict[str, Any]
    """the content of a run's environment.json"""
    free_memory: int
    """bytes of main memory that can still be taken"""
    precision: str
    """what `precision: auto` means here"""
    tuning: str
    """whether the process was prepared for training, or why not"""
    gflops: dict[str, float]
    """operation to 10^9 operations a second (a multiplication and an addition count as two)"""

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab machine --json`."""
        return {
            **self.environment,
            "free_memory": self.free_memory,
            "precision": self.precision,
            "tuning": self.tuning,
            "gflops": {what: round(rate, 1) for what, rate in self.gflops.items()},
        }


def run(options: MachineOptions, progress: Progress) -> MachineResult:
    """Describe and measure the machine, in about four seconds."""
    device = choose_device(options.device)
    found = environment(device)
    dtypes = [torch.float32] + [torch.bfloat16] * (fast_precision(device) == "bfloat16")
    works = [(f"{work.__name__}, {str(dtype)[6:]}", work, dtype) for dtype in dtypes for work in (product, convolution)]
    gflops = {}
    with progress.task("measuring", len(works), "rates") as task:
        for what, work, dtype in works:
            gflops[what] = rate(*work(device, dtype), device) / 1e9
            task.advance()
    tuning = (
        "prepared for training"
        if found["tuned"]
        else "left as it is (not Linux with glibc, or torch was imported before)"
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


def product(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A square matrix product as a function, and its number of operations."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * _MATRIX**3


def convolution(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A 1 x 1 convolution (a matrix product by another library) as a function, and its number of operations."""
    images = torch.randn(32, 512, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    filters = torch.randn(512, 512, 1, 1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(images, filters), 2.0 * 32 * 28 * 28 * 512 * 512


def rate(work: Callable[[], object], operations: float, device: str = "cpu") -> float:
    """Operations a second, from the median time of as many trials as fit into a second."""
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
