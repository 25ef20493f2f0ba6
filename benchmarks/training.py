"""Measure how fast bnlab trains and evaluates, compared with the plain way (plain.py) in the same run.

    python benchmarks/training.py PHOTOS [PAIRS] [SIZE]

PHOTOS is a folder of classes. Each pair is one process of the plain way and one of bnlab for each precision, one after
the other. The script prints the medians of the rates and of their ratios over the pairs, with the smallest and the
largest. A step trains bn_googlenet with both auxiliary heads on 32 photos of SIZE (default: 224) px, which are decoded
anew each time; waiting for them counts. The plain way uses float32, bnlab float32 and bfloat16. A pair takes about 90
seconds on two idle cores.

The limit is the rate of a step that only multiplies and adds: 3 x 2 x the multiply-adds of the forward pass (the
backward pass has two products for each of the forward pass), at the two rates that `bnlab machine` measures: that of a
square matrix product, and that of a 1 x 1 convolution, which another library computes.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent


def main(photos: Path, pairs: int, size: int) -> None:
    from bnlab.commands.machine import run
    from bnlab.nets import build
    from bnlab.nets.count import count
    from bnlab.options import MachineOptions
    from bnlab.progress import NullProgress

    found = run(MachineOptions(device="cpu"), NullProgress())
    gflops = found["gflops"]
    print(f"{date.today()}, {found['processor']}, {found['cores']} cores, torch {found['versions']['torch']}")
    print(", ".join(f"{what} {rate:.0f} GFLOP/s" for what, rate in gflops.items()))
    network = build("bn_googlenet", classes=5, auxiliary=True)
    operations = 6 * sum(layer.multiply_adds for layer in count(network, size))
    limits = {what: gflops[f"{what}, float32"] * 1e9 / operations for what in ("product", "convolution")}
    print(f"a training step is {operations / 1e9:.2f} GFLOP an image\n")
    ways = ("float32", "bfloat16")
    print("| what | plain | bnlab | ratio | peak MiB, plain | peak MiB, bnlab |\n| --- | --- | --- | --- | --- | --- |")
    for what, kinds in (("train", ways), ("evaluate", ("float32",))):
        rates: dict[str, list[tuple[float, float]]] = {}
        for _ in range(pairs):
            for kind in ("plain", *kinds):
                rates.setdefault(kind, []).append(measured(what, kind, photos, size))
        for kind in kinds:
            ratios = [own[0] / plain[0] for own, plain in zip(rates[kind], rates["plain"], strict=True)]
            cells = [spread([r for r, _ in rates[k]], ".1f") for k in ("plain", kind)] + [spread(ratios, ".2f")]
            cells += [spread([m for _, m in rates[k]], ".0f") for k in ("plain", kind)]
            print(f"| {what}, {kind} | {' | '.join(cells)} |", flush=True)
            if what == "train" and kind == "float32":
                rate = statistics.median(r for r, _ in rates[kind])
                fractions = ", ".join(f"{rate / limit:.0%} of the {name}'s" for name, limit in limits.items())
                note = f"limit: {', '.join(f'{limit:.1f}' for limit in limits.values())} images/s; reached {fractions}"
    print(f"\n{note}; n = {pairs} pairs of processes, 9 steps each")


def spread(values: list[float], form: str) -> str:
    """The median, with the smallest and the largest."""
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:{form}} ({low:{form}} to {high:{form}})"


def measured(what: str, kind: str, photos: Path, size: int) -> tuple[float, float]:
    """Images per second and peak MiB, measured in a separate process."""
    words = [str(HERE / ("plain.py" if kind == "plain" else "training.py")), what, str(photos), str(size)]
    done = subprocess.run(
        [sys.executable, *words, kind], capture_output=True, text=True, check=True, env=os.environ | {"OWN": "1"}
    )
    rate, memory, *waited = (float(number) for number in done.stdout.split())
    if waited:
        print(f"  waited for photos {waited[0]:.1%} of the step", file=sys.stderr)
    return rate, memory


def one(what: str, photos: Path, size: int, kind: str) -> None:
    """Measure bnlab in this process: print what `plain.report` prints, and the fraction of time spent on waiting."""
    from bnlab.machine import tune_allocator

    tune_allocator()
    sys.path.insert(0, str(HERE))
    from plain import report

    if what == "evaluate":
        report(evaluation(photos, size))
        return
    waits: list[float] = []
    began = time.perf_counter()
    report(training(photos, size, kind, waits))
    print(sum(waits) / (time.perf_counter() - began))


def training(photos: Path, size: int, kind: str, waits: list[float]) -> Iterator[int]:
    """Train without end, as `plain.training` does."""
    from bnlab.data.dataset import open_training_data
    from bnlab.nets import build
    from bnlab.progress import NullProgress
    from bnlab.recipe import Recipe
    from bnlab.training.build import build_context
    from bnlab.training.loop import train_step
    from bnlab.training.optimizer import set_learning_rate

    recipe = Recipe.model_validate({"size": size, "auxiliary": True, "precision": kind, "batch_size": 32})
    network = build("bn_googlenet", classes=5, auxiliary=True).train()
    dataset = open_training_data(photos, val=0.1, seed=0, progress=NullProgress())
    context = build_context(recipe, network, dataset, "cpu")  # without a cache: every photo is read again
    set_learning_rate(context.optimizer, 0.01)
    step = 0
    while True:
        batches = context.loader.epoch(0, size)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            waits.append(time.perf_counter() - began)
            if batch is None:
                break
            train_step(context, *batch, step)
            step += 1
            yield len(batch[1])


def evaluation(photos: Path, size: int) -> Iterator[int]:
    """Evaluate without end, as `plain.evaluation` does."""
    from bnlab.classifier.file import Card
    from bnlab.classifier.predict import Classifier
    from bnlab.data.loader import preprocessed_batches
    from bnlab.data.scan import scan
    from bnlab.nets import build
    from bnlab.nets.build import move_network
    from bnlab.recipe import Recipe
    from bnlab.training.build import preprocessing_of

    network = move_network(build("bn_googlenet", classes=5), "cpu")
    preprocessing = preprocessing_of(Recipe(size=size))
    card = Card(network=network.name, arguments=network.arguments, classes=tuple("abcde"), preprocessing=preprocessing)
    classifier = Classifier(network, card)
    paths = [found.path for found in scan(photos, [])]
    while True:
        for pixels, _ in preprocessed_batches(paths, preprocessing, batch_size=32, workers=-1):
            classifier.probabilities(pixels)
            yield len(pixels)


if __name__ == "__main__":
    if os.environ.get("OWN"):
        one(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    else:
        numbers = [int(text) for text in sys.argv[2:]]
        main(Path(sys.argv[1]), *(numbers + [5, 224][len(numbers) :]))
