"""Measure what `health.watch` costs a training: blocks of 64 steps with and without it, in alternating order.

    OMP_WAIT_POLICY=passive python benchmarks/watch.py [PAIRS]

Two networks: bn_small_inception on 32 images of 32 px, whose steps are short, and bn_googlenet on 16 images of 64 px. A
block of 64 steps has one window of measured steps, and ends with a report.
"""

import statistics
import sys
import time
from contextlib import nullcontext
from datetime import date

import torch
from torch.nn import functional as F

from bnlab import health
from bnlab.machine import environment
from bnlab.nets.build import build, move_network

STEPS = 64


def main(pairs: int) -> None:
    machine = environment("cpu")
    print(
        f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}, "
        f"{torch.get_num_threads()} threads, {pairs} pairs of {STEPS} steps"
    )
    for name, images, size in (("bn_small_inception", 32, 32), ("bn_googlenet", 16, 64)):
        measure(name, images, size, pairs)


def measure(name: str, images: int, size: int, pairs: int) -> None:
    torch.manual_seed(0)
    network = move_network(build(name, classes=5), "cpu").train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    x = torch.randn(images, 3, size, size).to(memory_format=torch.channels_last)
    targets = torch.arange(images) % 5

    def block(watched: bool) -> float:
        began = time.perf_counter()
        with health.watch(network, every=STEPS, report_every=STEPS) if watched else nullcontext():
            for _ in range(STEPS):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(network(x), targets).backward()
                optimizer.step()
        return time.perf_counter() - began

    block(False)
    ratios, plain = [], []
    for number in range(pairs):
        order = (False, True) if number % 2 else (True, False)
        seconds = {watched: block(watched) for watched in order}
        ratios.append(seconds[True] / seconds[False])
        plain.append(seconds[False] / STEPS)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"{name}, {images} images of {size} px: {1000 * statistics.median(plain):.1f} ms a step; with watch "
        f"{100 * (statistics.median(ratios) - 1):+.2f}% (quartiles {100 * (low - 1):+.2f}% to {100 * (high - 1):+.2f}%)"
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
