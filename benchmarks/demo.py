"""Run the demo over several seeds: the same network with and without batch normalisation, on held-out digits.

    python benchmarks/demo.py [SEEDS]

Each seed has its own split, initial weights and order of photos. The script prints a table for the README and takes
about 35 s a seed on two cores. The learning rate is that of the recipe `digits`; nothing was tuned on the held-out
digits.
"""

import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from bnlab.commands import demo
from bnlab.machine import environment
from bnlab.options import DemoOptions
from bnlab.progress import NullProgress

CHANCE = 0.1  # the accuracy that a diverged network counts with


def main(seeds: int) -> None:
    accuracy: dict[str, list[float]] = {name: [] for name in demo.NETWORKS}
    diverged = dict.fromkeys(demo.NETWORKS, 0)
    photos, seconds = 0, []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            result = demo.run(DemoOptions(seed=seed, runs=Path(folder)), NullProgress())
            seconds.append(time.perf_counter() - began)
        for name, trained in result.networks.items():
            accuracy[name].append(trained.test.top1 if trained.test and not trained.diverged else CHANCE)
            diverged[name] += trained.diverged is not None
            photos += trained.test.n if trained.test and name == "with BN" else 0
    machine = environment("cpu")
    print(f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}")
    print(f"{seeds} seeds, {photos} held-out digits in all, {statistics.median(seconds):.0f} s a demo (median)\n")
    print("| network | held-out accuracy, mean | lowest | highest | diverged |\n| --- | --- | --- | --- | --- |")
    for name, values in accuracy.items():
        print(f"| {name} | {statistics.mean(values):.1%} | {min(values):.1%} | {max(values):.1%} | {diverged[name]} |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
