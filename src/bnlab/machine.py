"""The machine: its cores, devices, memory and versions, and the settings that make training on it fast."""

import ctypes
import importlib.metadata
import os
import platform
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from bnlab.errors import OutOfMemoryError, UsageError, did_you_mean, printable, without_folders

_PACKAGES = ("bnlab", "torch", "numpy", "pillow", "safetensors", "scikit-learn", "scipy")

# Arguments of mallopt that make glibc's malloc keep freed memory: the tensors of one step are as large as those of the
# step before, and memory that goes back to the system returns in zeroed pages of 4 KiB, with one page fault each.
_MALLOPT = {"M_TRIM_THRESHOLD": (-1, 2_000_000_000), "M_MMAP_MAX": (-4, 0)}
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"  # makes torch ask for pages of 2 MiB

_tuned: dict[str, str] = {}  # the settings in effect

_exact_threads: list[int] = []  # threads in a block of `exact_kernels`
_exact_flags = ExitStack()
_exact_lock = threading.Lock()


def tune_allocator() -> Mapping[str, str]:
    """Prepare this process for training on a CPU: transparent huge pages, and a malloc that keeps freed memory.

    Call it before torch is imported; later it has no effect. It does nothing on platforms other than Linux with glibc,
    or if the environment has BNLAB_TUNE=0.

    Returns:
        The settings in effect, by name; `environment` has them too.
    """
    if _tuned or os.environ.get("BNLAB_TUNE") == "0" or "torch" in sys.modules:
        return _tuned
    if sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "mallopt"):  # musl
            return _tuned
        _tuned[_HUGE_PAGES] = os.environ.setdefault(_HUGE_PAGES, "1")
        for name, (number, level) in _MALLOPT.items():
            if libc.mallopt(number, level) == 1:
                _tuned[name] = str(level)
    return _tuned


def release_memory() -> None:
    """Return freed memory to the system, if `tune_allocator` made malloc keep it."""
    if "M_TRIM_THRESHOLD" in _tuned:
        ctypes.CDLL(None).malloc_trim(0)


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(wish: str) -> str:
    """The device to run on: `wish`, or for "auto" the first of CUDA, Apple's MPS and the CPU that is there.

    Raises:
        UsageError: there is no such device, or this machine does not have it.
    """
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wish == "auto":
        return next(name for name, found in there.items() if found)
    if wish not in there:
        raise UsageError(f"there is no device called '{printable(wish)}'", did_you_mean(wish, ["auto", *there]))
    if not there[wish]:
        found = " or ".join(name for name, found in there.items() if found)
        raise UsageError(f"PyTorch finds no {wish} device here", f"pass device {found}, or auto")
    return wish


def fast_precision(device: str) -> str:
    """The number format of the fastest convolutions: "bfloat16" if the device has it in hardware, else "float32"."""
    import torch

    native = False
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu" and platform.machine().lower() in ("x86_64", "amd64"):
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def free_memory() -> int:
    """Bytes of main memory that this process may still take, on the machine or in its control group."""
    free = []
    with suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            free.append(next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable")))
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
        if limit.isdigit():
            used = int(Path("/sys/fs/cgroup/memory.current").read_text("ascii"))
            free.append(max(0, int(limit) - used))
    return min(free, default=2**31)


@contextmanager
def memory_errors(batch_size: int, size: int, suggest_batch_size: Callable[[], str] | None = None) -> Iterator[None]:
    """Turn every error of full memory into an OutOfMemoryError whose remedy says what to make smaller.

    `suggest_batch_size` may measure the remedy; it is called after the failed work has released its memory.
    """
    try:
        yield
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed work
    half = "try half the batch_size, or a network of a smaller size"
    remedy = suggest_batch_size() if suggest_batch_size else half
    raise OutOfMemoryError(f"out of memory at a batch size of {batch_size} and a size of {size} px", remedy)


def is_out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Use cuDNN's kernels that repeat, in full float32.

    The flags are those of the process: the first of the threads that are in such a block sets them, and the last
    restores them.
    """
    import torch

    with _exact_lock:
        if not _exact_threads:
            cudnn = torch.backends.cudnn
            _exact_flags.enter_context(cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False))
        _exact_threads.append(threading.get_ident())
    try:
        yield
    finally:
        with _exact_lock:
            _exact_threads.pop()
            if not _exact_threads:
                _exact_flags.close()


def versions() -> dict[str, str]:
    """The versions of the libraries that a result depends on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def environment(device: str) -> dict[str, Any]:
    """The machine, the versions and the command that gave a result; no user or host name, and no folders.

    Results are passed on, and folders are private. So paths in the command are reduced to the names of files, and of a
    program that calls bnlab's Python API, the name is all that is kept.
    """
    import torch

    return {
        "python": platform.python_version(),
        "versions": versions(),
        "system": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "tuned": dict(_tuned),
        "device": device,
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "command": _command(),
    }


def _command() -> list[str]:
    program = Path(sys.argv[0])
    is_module = program.name == "__main__.py"
    if (program.parent.name if is_module else program.stem) != "bnlab":
        return [program.name]
    return [program.name, *map(without_folders, sys.argv[1:])]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
