"""Measure what `health.watch` costs a training: blocks of 64 steps with and without it, in alternating order.

    OMP_WAIT_POLICY=passive python benchmarks/watch.py [PAIRS]

Two networks: bn_small_inception on 32 images of 32 px, whose steps are short, and bn_googlenet on 16 images of 64 px. A
block of 64 steps has one window of measured steps, and ends with a report. Pairs of blocks differ by chance by more
than the watch costs, so the time that is spent in its own code is given too, as a share of the time of the block.
"""

import functools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from typing import Any

import torch
from torch.nn import functional as F

from bnlab import health
from bnlab.health.watch import Watch, _Relus
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
                F.cross_entropy(network(x), targets).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return time.perf_counter() - began

    block(False)
    ratios, plain, own = [], [], []
    for number in range(pairs):
        order = (False, True) if number % 2 else (True, False)
        spent.clear()
        seconds = {watched: block(watched) for watched in order}
        ratios.append(100 * (seconds[True] / seconds[False] - 1))
        own.append(100 * sum(spent) / seconds[True])
        plain.append(1000 * seconds[False] / STEPS)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"{name}, {images} images of {size} px: {statistics.median(plain):.1f} ms a step; with watch "
        f"{statistics.median(ratios):+.2f}% (quartiles {low:+.2f}% to {high:+.2f}%); in its own code "
        f"{statistics.median(own):.2f}% (from {min(own):.2f}% to {max(own):.2f}%)",
        flush=True,
    )


spent: list[float] = []  # seconds of each outermost call of the watch's code


def time_the_watch() -> None:
    """Add the time that every call of the watch's code takes to `spent`."""
    depth = 0

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any) -> Any:
            nonlocal depth
            began, depth = time.perf_counter(), depth + 1
            try:
                return function(*args)
            finally:
                depth -= 1
                if not depth:
                    spent.append(time.perf_counter() - began)

        return run

    for owner, names in (
        (Watch, ("__enter__", "__exit__", "_root_begins", "_root_ends", "_layer_begins")),
        (_Relus, ("ran", "begins")),
    ):
        for name in names:
            setattr(owner, name, timed(getattr(owner, name)))


if __name__ == "__main__":
    time_the_watch()
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
