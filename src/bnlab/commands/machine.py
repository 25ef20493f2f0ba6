"""`bnlab machine`: describe this machine, how bnlab uses it, and how fast it multiplies matrices."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from bnlab.machine import choose_device, environment, fast_precision, free_memory
from bnlab.options import MachineOptions
from bnlab.progress import Progress

_SECONDS = 1.0  # of each measurement
_MATRIX = 2048  # rows and columns


def run(options: MachineOptions, progress: Progress) -> dict[str, Any]:
    """Describe and measure the machine, in about four seconds.

    Returns:
        The document of `bnlab machine --json`: the content of a run's environment.json, and
        free_memory: bytes of main memory that can still be taken;
        precision: what `precision: auto` means here;
        tuning: whether the process was prepared for training, or why not;
        gflops: operation to 10^9 operations a second (a multiplication and an addition count as two).
    """
    device = choose_device(options.device)
    found = environment(device)
    precision = fast_precision(device)
    dtypes = [torch.float32] + [torch.bfloat16] * (precision == "bfloat16")
    works = [(f"{work.__name__}, {str(dtype)[6:]}", work, dtype) for dtype in dtypes for work in (product, convolution)]
    gflops = {}
    with progress.task("measuring", len(works), "rates") as task:
        for what, work, dtype in works:
            function, operations = work(device, dtype)
            gflops[what] = round(operations / seconds(function) / 1e9, 1)
            task.advance()
    tuning = "left as it is (not Linux with glibc, or torch was imported before)"
    if os.environ.get("BNLAB_TUNE") == "0":
        tuning = "left as it is (BNLAB_TUNE=0)"
    elif found["tuned"]:
        tuning = "prepared for training"
    return found | {"free_memory": free_memory(), "precision": precision, "tuning": tuning, "gflops": gflops}


def product(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A square matrix product as a function, and its number of operations."""
    a, b = (torch.randn(_MATRIX, _MATRIX, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2.0 * _MATRIX**3


def convolution(device: str, dtype: torch.dtype) -> tuple[Callable[[], object], float]:
    """A 1 x 1 convolution (a matrix product by another library) as a function, and its number of operations."""
    images = torch.randn(32, 512, 28, 28, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    filters = torch.randn(512, 512, 1, 1, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(images, filters), 2.0 * 32 * 28 * 28 * 512 * 512


def seconds(work: Callable[[], object]) -> float:
    """Median time of the work over about a second, on all of PyTorch's threads."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=_SECONDS).median
