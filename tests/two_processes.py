"""Runs a test module's functions in two processes that torch.distributed connects (gloo, on the CPU)."""

import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_scenes(module: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two processes returns for each function of the module's SCENES, which takes its rank."""
    # Both processes are forked from a server that has imported what takes seconds.
    multiprocessing.get_context("forkserver").set_forkserver_preload([module, "torch._dynamo"])
    torch.multiprocessing.start_processes(_act, args=(module, str(folder)), nprocs=2, start_method="forkserver")
    first, second = (torch.load(folder / str(rank), weights_only=False) for rank in range(2))
    return first, second


def _act(rank: int, module: str, folder: str) -> None:
    torch.set_num_threads(1)
    scenes = (sys.modules.get(module) or import_module(module)).SCENES
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save({name: scene(rank) for name, scene in scenes.items()}, f"{folder}/{rank}")
    dist.barrier()
    os._exit(0)  # torch's own way out aborts now and then: "terminate called without an active exception"
