"""What the BN watch costs a training step: pairs of steps with and without it, in turn.

    OMP_WAIT_POLICY=passive python benchmarks/watch.py [SECONDS]

bn_googlenet, 32 images of 96 px. A sampled step is measured as well as one that is not, and the digest of a run; what
it costs on average follows from how many steps are sampled.
"""

import statistics
import sys
import time
from collections.abc import Callable
from datetime import date

import torch
from torch.nn import functional as F

from bnlab.health.bn_monitor import BNMonitor
from bnlab.machine import environment
from bnlab.nets.build import build, move_network

WINDOW, EVERY = 8, 64


def main(seconds: float) -> None:
    """Time it, and print the figures."""
    machine = environment("cpu")
    print(f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}")
    print(f"{torch.get_num_threads()} threads")
    network = move_network(build("bn_googlenet", classes=5), "cpu").train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    images = torch.randn(32, 3, 96, 96).to(memory_format=torch.channels_last)
    targets = torch.arange(32) % 5
    watch = BNMonitor(network, window=WINDOW, every=EVERY)
    spent = 0.0  # seconds within the watch, in the step just done

    def step(number: int | None) -> float:
        nonlocal spent
        began = time.perf_counter()
        if number is not None:
            watch.before(number)
            spent = time.perf_counter() - began
        loss = F.cross_entropy(network(images), targets)
        if number is not None:
            middle = time.perf_counter()
            watch.after(number)
            spent += time.perf_counter() - middle
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return time.perf_counter() - began

    for number in (None, 0, 1):
        step(number)  # warm-up
    watch.report()
    pairs: list[tuple[float, float]] = []  # plain, with a sampled step
    inside: dict[str, list[float]] = {"first of a run": [], "others": [], "last, with the digest": []}
    until, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        order: list[int | None] = [None, number] if number % 2 else [number, None]
        took = {chosen: step(chosen) for chosen in order}
        pairs.append((took[None], took[number]))
        place = number % EVERY
        kinds = {0: "first of a run", WINDOW - 1: "last, with the digest"}
        inside[kinds.get(place, "others")].append(spent)
        number = number + 1 if place < WINDOW - 1 else number - place + EVERY
    plain = [a for a, _ in pairs]
    base = statistics.median(plain)
    print(f"step without: {_middle(plain, 1e3)} ms, n = {len(pairs)}")
    print(f"sampled step against its neighbour without: {_middle([b / a for a, b in pairs], 1)}")
    for name, values in inside.items():
        print(f"in the watch, {name}: {_middle(values, 1e6)} us, n = {len(values)}")
    idle = _each(lambda: (watch.before(EVERY - 1), watch.after(EVERY - 1)))
    first, others, last = (statistics.median(values) for values in inside.values())
    run = first + (WINDOW - 2) * others + last + (EVERY - WINDOW) * idle
    began = time.perf_counter()
    health = watch.report()
    print(
        f"a step not sampled: {idle * 1e6:.2f} us; a report: {(time.perf_counter() - began) * 1e3:.0f} ms, "
        f"{len(health.layers)} layers"
    )
    print(f"on average {run / EVERY * 1e6:.0f} us a step: {run / EVERY / base:.4%} of it")


def _each(work: Callable[[], object], times: int = 1000) -> float:
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def _middle(values: list[float], scale: float) -> str:
    low, median, high = (value * scale for value in statistics.quantiles(values, n=4))
    return f"{median:.4g} ({low:.4g} to {high:.4g})"


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 50.0)
