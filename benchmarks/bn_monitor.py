"""Measure what the BN monitor costs a training step: pairs of steps with and without it, in alternating order.

    OMP_WAIT_POLICY=passive python benchmarks/bn_monitor.py [SECONDS]

The network is bn_googlenet on 32 images of 96 px. Steps that the monitor samples, steps that it does not sample and the
summary at the end of a window are measured; the average cost follows from the fraction of steps that are sampled.
"""

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date

import torch
from torch.nn import functional as F

from bnlab.health.bn_monitor import BNMonitor
from bnlab.machine import environment
from bnlab.nets.build import build, move_network

WINDOW, EVERY = 8, 64


def main(seconds: float) -> None:
    machine = environment("cpu")
    print(
        f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}\n"
        f"{torch.get_num_threads()} threads"
    )
    network = move_network(build("bn_googlenet", classes=5), "cpu").train()
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    images = torch.randn(32, 3, 96, 96).to(memory_format=torch.channels_last)
    targets = torch.arange(32) % 5
    monitor = BNMonitor(network, window=WINDOW, every=EVERY)
    spent = 0.0  # seconds that the monitor took in the last step

    def step(number: int | None) -> float:
        nonlocal spent
        began = time.perf_counter()
        monitored = nullcontext() if number is None else monitor.step(number)
        with monitored:
            entered = time.perf_counter()
            loss = F.cross_entropy(network(images), targets)
            leaving = time.perf_counter()
        spent = (entered - began) + (time.perf_counter() - leaving)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return time.perf_counter() - began

    for number in (None, 0, 1):
        step(number)  # warm-up
    monitor.report()
    pairs: list[tuple[float, float]] = []  # plain, with a sampled step
    inside: dict[str, list[float]] = {"first of a window": [], "others": [], "last, with the summary": []}
    until, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        order: list[int | None] = [None, number] if number % 2 else [number, None]
        took, within = {}, {}
        for chosen in order:
            took[chosen] = step(chosen)
            within[chosen] = spent
        pairs.append((took[None], took[number]))
        position = number % EVERY
        kinds = {0: "first of a window", WINDOW - 1: "last, with the summary"}
        inside[kinds.get(position, "others")].append(within[number])
        number = number + 1 if position < WINDOW - 1 else number - position + EVERY
    plain = [a for a, _ in pairs]
    base = statistics.median(plain)
    print(f"step without: {_middle(plain, 1e3)} ms, n = {len(pairs)}")
    print(f"sampled step against its neighbour without: {_middle([b / a for a, b in pairs], 1)}")
    for name, values in inside.items():
        print(f"in the monitor, {name}: {_middle(values, 1e6)} us, n = {len(values)}")

    def not_sampled() -> None:
        with monitor.step(EVERY - 1):
            pass

    idle = _each(not_sampled)
    first, others, last = (statistics.median(values) for values in inside.values())
    total = first + (WINDOW - 2) * others + last + (EVERY - WINDOW) * idle
    began = time.perf_counter()
    health = monitor.report()
    print(
        f"a step not sampled: {idle * 1e6:.2f} us; a report: {(time.perf_counter() - began) * 1e3:.0f} ms, "
        f"{len(health.layers)} layers"
    )
    print(f"on average {total / EVERY * 1e6:.0f} us a step: {total / EVERY / base:.4%} of it")


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
