"""Measure what a diagnosis costs: its time against that of a plain evaluation of the same images, in alternating order.

    OMP_WAIT_POLICY=passive python benchmarks/doctor.py [ROUNDS] [SIZE]

The network is bn_googlenet on 1,024 images of SIZE px (default: 128) in batches of 32, which are in memory: reading
photos adds to the evaluation as much as to a pass of the diagnosis, of which there are two. It is diagnosed with
statistics that fit the images, and with stale ones, of which the initial mean 0 and variance 1 weigh half: there the
diagnosis also asks what else would explain them. Memory is measured for 256 and for 1,024 images: the highest resident
memory of a separate process, which must not grow with the number of batches beyond the images themselves, which are
views of one batch. The script needs Linux.
"""

import resource
import statistics
import subprocess
import sys
import time
from datetime import date

import torch
from torch import Tensor

from bnlab.health import diagnose
from bnlab.machine import environment, tune_allocator
from bnlab.nets.build import build, move_network
from bnlab.nets.network import TableNetwork
from bnlab.norm import recalibrate
from bnlab.norm.layers import BatchNorm


def prepare(images: int, size: int, *, stale: bool = False) -> tuple[TableNetwork, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    network = move_network(build("bn_googlenet", classes=5), "cpu").eval()
    batch = torch.randn(32, 3, size, size).to(memory_format=torch.channels_last)
    recalibrate(network, [batch])
    with torch.no_grad():
        labels = network(batch).argmax(1)
    for module in network.modules() if stale else ():
        if isinstance(module, BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.mul_(0.5)
            module.running_var.mul_(0.5).add_(0.5)
    return network, [(batch, labels)] * (images // 32)


@torch.no_grad()
def evaluate(network: TableNetwork, batches: list[tuple[Tensor, Tensor]]) -> float:
    began = time.perf_counter()
    for images, labels in batches:
        (network(images).argmax(1) == labels).sum().item()
    return time.perf_counter() - began


def main(rounds: int, size: int) -> None:
    machine = environment("cpu")
    print(
        f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}\n"
        f"bn_googlenet, 1,024 images of {size} px, batch 32, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    for stale in (False, True):
        network, batches = prepare(1024, size, stale=stale)
        evaluate(network, batches[:4])
        plain, diagnosed = [], []
        for _ in range(rounds):
            plain.append(evaluate(network, batches))
            began = time.perf_counter()
            diagnose(network, batches)
            diagnosed.append(time.perf_counter() - began)
        ratios = [b / a for a, b in zip(plain, diagnosed, strict=True)]
        print(
            f"{'stale' if stale else 'sound'} statistics: evaluation {statistics.median(plain):.1f} s, diagnosis "
            f"{statistics.median(diagnosed):.1f} s; ratio {statistics.median(ratios):.2f} "
            f"(from {min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
    for images in (256, 1024):
        words = [sys.executable, __file__, "memory", str(images), str(size)]
        peak = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        print(f"peak memory with {images} images: {peak} MiB")


def memory(images: int, size: int) -> None:
    diagnose(*prepare(images, size))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


if __name__ == "__main__":
    tune_allocator()
    if sys.argv[1:2] == ["memory"]:
        memory(int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3, int(sys.argv[2]) if len(sys.argv) > 2 else 128)
