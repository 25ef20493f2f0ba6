"""Measure what norm/ costs and what it saves, each compared with the plain way in the same run.

    python benchmarks/norm.py [layers] [recalibrate] [population] [sync] [memory] [fold]

Without names all parts run, which takes about ten minutes on two idle cores. The ways take turns, round after round,
and each time is divided by that of the plain way in the same round; the script prints the median ratio and the middle
half of the ratios. Shapes are those of bn_googlenet with both auxiliary heads in a training step of 32 images, channels
last.
"""

import copy
import statistics
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnlab.machine import environment
from bnlab.nets.build import TableNetwork, build, move_network
from bnlab.norm import BatchNorm2d, convert_sync, fold, recalibrate, save_memory
from bnlab.norm.layers import BatchNorm, batch_norm_layers

BATCH = 32
LAST = torch.channels_last


def main(parts: list[str]) -> None:
    machine = environment("cpu")
    print(f"{date.today()}, {machine['processor']}, {machine['cores']} cores, torch {machine['versions']['torch']}")
    for name, part in PARTS.items():
        if not parts or name in parts:
            print(f"\n## {name}")
            part()


def layers() -> None:
    """Time forward and backward of each BN layer of bn_googlenet, separately, against that of torch.nn."""
    shapes = Counter(_layer_shapes(224))
    print(
        f"{sum(shapes.values())} layers of {len(shapes)} shapes, forward and backward, ratio to torch.nn.BatchNorm2d\n"
    )
    print("| shape | layers | torch.nn | bnlab | middle half |\n| --- | --- | --- | --- | --- |")
    plain_total = own_total = 0.0
    ratios, more = [], []
    for shape, count in sorted(shapes.items(), key=lambda item: -torch.Size(item[0]).numel()):
        x = torch.randn(shape) + torch.linspace(-2, 2, shape[1])[:, None, None]
        x = x.to(memory_format=LAST).requires_grad_()
        dy = torch.randn(shape).to(memory_format=LAST)
        ways = {"plain": _step(nn.BatchNorm2d(shape[1]), x, dy), "own": _step(BatchNorm2d(shape[1]), x, dy)}
        found = _alternate(ways, seconds=4.0)
        plain, own = statistics.median(found["plain"]), statistics.median(found["own"])
        plain_total, own_total = plain_total + count * plain, own_total + count * own
        ratios.append(own / plain)
        more += [own - plain] * count
        low, ratio, high = _spread(found["own"], found["plain"])
        size = " x ".join(map(str, shape))
        print(f"| {size} | {count} | {plain * 1e6:.0f} us | {ratio:.3f} | {low:.3f} to {high:.3f} |")
    print(f"\nall layers, by their time: {own_total / plain_total:.3f}; worst shape {max(ratios):.3f}")
    print(f"additional time for a layer, median: {statistics.median(more) * 1e6:.1f} us")


def recalibration() -> None:
    """Time the measuring pass against the forward passes it needs, in which the network normalises by batches."""
    network = move_network(build("bn_googlenet", classes=5), "cpu")
    batches = [torch.randn(BATCH, 3, 128, 128).to(memory_format=LAST) for _ in range(4)]

    def forwards() -> None:
        with torch.no_grad():
            for batch in batches:
                network(batch)

    def as_training() -> None:
        for _, layer in batch_norm_layers(network.eval()):
            layer.train()
        forwards()

    def as_inference() -> None:
        network.eval()
        forwards()

    found = _alternate(
        {
            "plain": as_training,
            "inference": as_inference,
            "one pass": lambda: recalibrate(network.eval(), batches),
        },
        seconds=45.0,
    )
    slow = _alternate(
        {"plain": as_training, "slow": lambda: recalibrate(network.eval(), batches, layer_by_layer=True)}, least=3
    )
    print(f"{len(batches)} batches of {BATCH}, 128 px; ratio to plain forwards that normalise by batches\n")
    for name in ("inference", "one pass"):
        low, ratio, high = _spread(found[name], found["plain"])
        print(f"- {name}: {ratio:.2f} ({low:.2f} to {high:.2f}), n = {len(found[name])}")
    low, ratio, high = _spread(slow["slow"], slow["plain"])
    print(f"- layer by layer: {ratio:.1f} ({low:.1f} to {high:.1f}), n = {len(slow['slow'])}")
    ratio = statistics.median(a / b for a, b in zip(found["one pass"], found["inference"], strict=True))
    print(f"- one pass, against inference: {ratio:.2f}")
    print(f"- layer by layer reads the batches {recalibrate(network, batches, layer_by_layer=True).passes} times")


def population() -> None:
    """Compare the held-out accuracy with each kind of statistics, of a network trained on few batches of digits."""
    seeds, epochs = 3, (1, 3)
    print(f"scikit-learn's digits at 32 px, 1,200 to train on and 597 held out, batches of {BATCH}, {seeds} seeds;")
    print("held-out accuracy, mean (lowest to highest); logits apart: largest distance from the exact way's, in std\n")
    print("| statistics | " + " | ".join(f"epoch {n}" for n in epochs) + " | logits apart (last) |")
    print("| --- |" + " --- |" * (len(epochs) + 1))
    accuracy: dict[str, dict[int, list[float]]] = {}
    apart: dict[str, list[float]] = {}
    for seed in range(seeds):
        for epoch, found in _digits(seed, epochs):
            exact = found["layer by layer"][1]
            for name, (correct, logits) in found.items():
                accuracy.setdefault(name, {}).setdefault(epoch, []).append(correct)
                if epoch == epochs[-1]:
                    apart.setdefault(name, []).append(float((logits - exact).abs().max() / exact.std()))
    for name, by_epoch in accuracy.items():
        cells = [f"{statistics.mean(a):.1%} ({min(a):.1%} to {max(a):.1%})" for a in by_epoch.values()]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(apart[name]):.2g} |")


def _digits(seed: int, epochs: tuple[int, ...]) -> Iterator[tuple[int, dict[str, tuple[float, Tensor]]]]:
    """After each of these epochs, accuracy and logits on the held-out digits with each kind of statistics."""
    images, labels = _digit_images(seed)
    train, held_out = images[:1200], images[1200:]
    network = move_network(build("bn_small_inception", classes=10, seed=seed), "cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(1, epochs[-1] + 1):
        network.train()
        for batch in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(network(train[batch]), labels[batch]).backward()
            optimizer.step()
        if epoch not in epochs:
            continue
        found = {}
        batches = train[:1184].split(BATCH)
        for name, options in WAYS.items():
            measured = copy.deepcopy(network)
            if options is not None:
                recalibrate(measured, batches, **options)
            with torch.no_grad():
                logits = measured.eval()(held_out)
            found[name] = float((logits.argmax(1) == labels[1200:]).float().mean()), logits
        yield epoch, found


def _digit_images(seed: int) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits in another order for each seed: 1797 x 3 x 32 x 32, and their labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    images = F.interpolate(torch.from_numpy(digits.images / 8 - 1).float()[order, None], size=32).expand(-1, 3, -1, -1)
    return images.contiguous(memory_format=LAST), torch.from_numpy(digits.target)[order]


WAYS: dict[str, dict[str, bool] | None] = {
    "running (moving average)": None,
    "one pass": {},
    "layer by layer": {"layer_by_layer": True},
    "as the paper": {"as_paper": True},
}


def synchronisation() -> None:
    """Time a training step of two processes, one thread each, with and without synchronised statistics."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_sync_process, args=(folder,), nprocs=2)


def _sync_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    plain = move_network(build("bn_googlenet", classes=5), "cpu")
    networks = {"plain": plain, "sync": convert_sync(copy.deepcopy(plain)).model}
    x, targets = torch.randn(16, 3, 128, 128).to(memory_format=LAST), torch.arange(16) % 5
    # Both processes must do the same number of steps, so that number is fixed rather than the time.
    found = _alternate({name: _training_step(net, x, targets) for name, net in networks.items()}, rounds=12)
    if rank == 0:
        low, ratio, high = _spread(found["sync"], found["plain"])
        layer_count = sum(1 for _ in batch_norm_layers(plain))
        more = statistics.median(a - b for a, b in zip(found["sync"], found["plain"], strict=True)) / layer_count
        print("two processes on gloo, one thread each, 16 images of 128 px each, forward and backward\n")
        print(f"- step: {ratio:.2f} ({low:.2f} to {high:.2f}) times the step without, n = {len(found['sync'])}")
        print(f"- {layer_count} layers, {more * 1e3:.2f} additional ms for each")
    dist.destroy_process_group()


def memory() -> None:
    """Measure the peak of live tensors, as torch dispatches them, and the time of a training step at 224 px."""
    own = move_network(build("bn_googlenet", classes=5, auxiliary=True), "cpu")
    plain = move_network(_with_torchs_layers(own), "cpu")
    x, targets = torch.randn(BATCH, 3, 224, 224).to(memory_format=LAST), torch.arange(BATCH) % 5
    steps = {
        "plain": _training_step(plain, x, targets),
        "bnlab's layers": _training_step(own, x, targets),
        "within save_memory()": _training_step(own, x, targets, save_memory),
    }
    peaks, gradients = {}, {}
    for name, step in steps.items():
        with _Peak() as peak:
            step()
        peaks[name] = peak.highest
        gradients[name] = [p.grad for p in (plain if name == "plain" else own).parameters()]
    found = _alternate(steps, seconds=150.0, least=7)
    print(f"bn_googlenet, {BATCH} images of 224 px, forward and backward; plain: nn.BatchNorm2d, ReLU in place\n")
    print("| way | peak | less | time | middle half | gradients differ by |\n| --- | --- | --- | --- | --- | --- |")
    for name in steps:
        low, ratio, high = _spread(found[name], found["plain"])
        off = max(float((a - b).abs().max()) for a, b in zip(gradients[name], gradients["plain"], strict=True))
        less = 1 - peaks[name] / peaks["plain"]
        print(
            f"| {name} | {peaks[name] / 2**20:.0f} MiB | {less:.1%} | {ratio:.3f} | {low:.3f} to {high:.3f} | {off:g} |"
        )
    print(f"\nn = {len(found['plain'])} steps of each")


def folding() -> None:
    """Compare inference with and without folded batch normalisation, of a network after a short training."""
    images, labels = _digit_images(0)
    network = move_network(build("bn_googlenet", classes=10), "cpu")
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    for start in range(0, 30 * BATCH, BATCH):
        optimizer.zero_grad()
        F.cross_entropy(network(images[start : start + BATCH]), labels[start : start + BATCH]).backward()
        optimizer.step()
    recalibrate(network, images[:960].split(BATCH))
    folding, x = fold(network.eval()), images[1200:]
    ways = {"plain": network, "folded": folding.model, "float64": copy.deepcopy(network).double()}
    with torch.no_grad():
        logits = {name: model(x.double() if name == "float64" else x) for name, model in ways.items()}
        std = float(logits["plain"].std())
        print(f"{len(folding.folded)} of {len(folding.folded) + len(folding.kept)} layers of bn_googlenet fold\n")
        for one, other in (("folded", "plain"), ("plain", "float64"), ("folded", "float64")):
            off = float((logits[one] - logits[other]).abs().max()) / std
            print(f"- logits, {one} against {other}: {off:.1e} of their standard deviation, {len(x)} digits")
        x = torch.randn(BATCH, 3, 128, 128).to(memory_format=LAST)
        found = _alternate({"plain": lambda: network(x), "folded": lambda: folding.model(x)}, seconds=30.0)
    low, ratio, high = _spread(found["folded"], found["plain"])
    n = len(found["plain"])
    print(f"- inference, {BATCH} images of 128 px: {ratio:.3f} ({low:.3f} to {high:.3f}) of the time, n = {n}")


def _alternate(
    ways: Mapping[str, Callable[[], object]], *, seconds: float = 10.0, least: int = 5, rounds: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each way. They take turns, each round in another order, after one round that is not timed."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    began, names = time.perf_counter(), list(ways)
    while len(found[names[0]]) < (rounds or least) or (rounds is None and time.perf_counter() - began < seconds):
        for name in names:
            start = time.perf_counter()
            ways[name]()
            found[name].append(time.perf_counter() - start)
        names = names[1:] + names[:1]
    return found


def _spread(times: list[float], plain: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the ratios of each time to the plain one in the same round."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(times, plain, strict=True)], n=4)
    return low, middle, high


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    parameters = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x), parameters, dy) and None


def _training_step(
    network: nn.Module, x: Tensor, targets: Tensor, context: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Callable[[], None]:
    def step() -> None:
        network.train().zero_grad()
        torch.manual_seed(0)
        with context():
            outputs = network(x)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(F.cross_entropy(output, targets) for output in outputs).backward()  # type: ignore[union-attr]

    return step


def _layer_shapes(size: int) -> list[tuple[int, ...]]:
    network = build("bn_googlenet", classes=5, auxiliary=True)
    shapes: list[tuple[int, ...]] = []
    for _, layer in batch_norm_layers(network):
        layer.register_forward_pre_hook(lambda _, args: shapes.append((BATCH, *args[0].shape[1:])))
    network(torch.randn(2, 3, size, size))
    return shapes


def _with_torchs_layers(network: TableNetwork) -> TableNetwork:
    plain = copy.deepcopy(network)
    for module in list(plain.modules()):
        if isinstance(getattr(module, "bn", None), BatchNorm):
            layer = nn.BatchNorm2d(module.bn.num_features)
            layer.load_state_dict(module.bn.state_dict())
            module.bn = layer
    return plain


class _Peak(TorchDispatchMode):
    """Records the most bytes of tensors made within it that are alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.highest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
        self.highest = max(self.highest, sum(self.live.values()))
        return result


PARTS = {
    "layers": layers,
    "recalibrate": recalibration,
    "population": population,
    "sync": synchronisation,
    "memory": memory,
    "fold": folding,
}

if __name__ == "__main__":
    main(sys.argv[1:])
