import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

from bnlab.errors import OutOfMemoryError, UsageError
from bnlab.machine import (
    choose_device,
    environment,
    exact_kernels,
    fast_precision,
    free_memory,
    memory_errors,
    usable_cores,
    versions,
)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="no cuda device here: pass device cpu, or auto"):
        choose_device("cuda")
    with pytest.raises(UsageError, match="there is no device called 'gpu': did you mean 'cpu'"):
        choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"


def test_environment_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads(json.dumps(environment("cpu")))
    assert document["versions"]["torch"] == torch.__version__ == versions()["torch"]
    assert document["cores"] == usable_cores() >= 1


def test_the_command_has_no_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be private: environment.json and the pages that show it are passed on."""
    words = ["train", "/home/anna/flowers/", "--name", "a", "--init", "../b/best.safetensors", "--set", "momentum=0.8",
             "--set", "init=/home/anna b/c.safetensors", "--init=C:\\Users\\anna\\d.safetensors"]  # fmt: skip
    reduced = ["train", "flowers", "--name", "a", "--init", "best.safetensors", "--set", "momentum=0.8",
               "--set", "init=c.safetensors", "--init=d.safetensors"]  # fmt: skip
    for program in ("/home/anna/bin/bnlab", "/x/bnlab/__main__.py", "bnlab.exe"):
        monkeypatch.setattr(sys, "argv", [program, *words])
        assert environment("cpu")["command"] == [Path(program).name, *reduced]
    for program in ("/home/anna/secret/mine.py", "/x/other/__main__.py", ""):
        monkeypatch.setattr(sys, "argv", [program, "--token", "12345"])
        assert environment("cpu")["command"] == [Path(program).name]


def tuned(before: str = "", **variables: str) -> dict[str, str]:
    """What `tune_allocator` does in a separate process, and what of it is seen there."""
    script = (
        f"{before}\nimport json, os, bnlab\ndone = dict(bnlab.tune_allocator())\n"
        "print(json.dumps([done, dict(bnlab.tune_allocator()), os.environ.get('THP_MEM_ALLOC_ENABLE')]))"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("BNLAB_TUNE", "THP_MEM_ALLOC_ENABLE")}
    text = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean | variables
    ).stdout
    done, again, seen = json.loads(text)
    assert again == done
    assert seen == (done.get("THP_MEM_ALLOC_ENABLE") or variables.get("THP_MEM_ALLOC_ENABLE"))
    found: dict[str, str] = done
    return found


@pytest.mark.skipif("CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="not glibc")
def test_a_process_is_prepared_before_torch_and_only_then() -> None:
    done = tuned()
    assert done["THP_MEM_ALLOC_ENABLE"] == "1"
    assert {"M_TRIM_THRESHOLD", "M_MMAP_MAX"} <= done.keys()
    assert tuned(BNLAB_TUNE="0") == {}
    assert tuned("import torch") == {}
    assert tuned(THP_MEM_ALLOC_ENABLE="0")["THP_MEM_ALLOC_ENABLE"] == "0"  # the user's own


def test_other_platforms_are_left_alone() -> None:
    assert tuned("import sys; sys.platform = 'darwin'") == {}
    assert tuned("import os; os.confstr_names = {}") == {}  # musl


def test_bfloat16_where_the_device_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for avx, amx, expected in (
        (False, False, "float32"), (True, False, "bfloat16"), (False, True, "bfloat16"),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert fast_precision("cpu") == expected
    assert fast_precision("mps") == "float32"
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert fast_precision("cpu") == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert fast_precision("cuda") == "float32"


def test_free_memory_is_at_most_all_memory() -> None:
    assert free_memory() > 0
    if hasattr(os, "sysconf") and Path("/proc/meminfo").exists():
        assert free_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_full_memory_is_reported_with_what_fits() -> None:
    with (
        pytest.raises(OutOfMemoryError, match=r"of 64 and a size of 96 px: batch_size=16 fits"),
        memory_errors(64, 96, lambda: "batch_size=16 fits"),
    ):
        raise MemoryError
    with pytest.raises(RuntimeError, match="another"), memory_errors(64, 96):
        raise RuntimeError("another")


def test_failed_work_releases_its_memory_before_the_remedy_is_measured() -> None:
    """The frames of a failed step hold its tensors, and while they do, nothing else fits either."""

    class Large:
        pass

    seen: list[weakref.ref[Large]] = []

    def step() -> None:
        large = Large()
        seen.append(weakref.ref(large))
        raise MemoryError

    with (
        pytest.raises(OutOfMemoryError, match="gone"),
        memory_errors(64, 96, lambda: "gone" if seen[0]() is None else "still there"),
    ):
        step()


def test_the_last_thread_restores_the_kernels() -> None:
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    first, second = exact_kernels(), exact_kernels()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == (False, True, False)
    second.__exit__(None, None, None)
    assert (cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32) == before != (False, True, False)
