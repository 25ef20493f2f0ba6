"""The machine: how many cores, which device, and what to write down about it."""

import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnlab.errors import OutOfMemoryError, UsageError, did_you_mean, printable

_PACKAGES = ("bnlab", "torch", "numpy", "pillow", "safetensors", "scikit-learn", "scipy")


def usable_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(wish: str) -> str:
    """The device to run on: `wish`, or for "auto" the first of CUDA, Apple's MPS and the CPU that is there.

    Raises:
        UsageError: the wished-for device is not there, or is none.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish == "auto":
        return next(name for name, found in there.items() if found)
    if wish not in there:
        raise UsageError(f"there is no device called '{printable(wish)}'", did_you_mean(wish, ["auto", *there]))
    if not there[wish]:
        found = " or ".join(name for name, found in there.items() if found)
        raise UsageError(f"PyTorch finds no {wish} device here", f"say --device {found}, or auto")
    return wish


@contextmanager
def memory_errors(batch_size: int, size: int) -> Iterator[None]:
    """Turn whatever a device says of full memory into an OutOfMemoryError that names what could be smaller."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not full:
            raise
        raise OutOfMemoryError(
            f"out of memory at a batch size of {batch_size} and a size of {size} px",
            "try half the --batch-size, or a network of a smaller --size",
        ) from None


def versions() -> dict[str, str]:
    """The versions of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def environment(device: str) -> dict[str, Any]:
    """What a reader of a result wants to know about where it came from; neither who nor which host."""
    import torch

    return {
        "python": platform.python_version(),
        "versions": versions(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
