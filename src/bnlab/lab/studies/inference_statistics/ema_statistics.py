"""Moving averages of the batches' statistics and other statistics for inference, compared during a training.

Shapes: C is the number of channels of all layers together. "2C" are the means of all layers, then their variances.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bnlab.data.dataset import Dataset
from bnlab.lab.records import Value
from bnlab.lab.replay import preserving_state
from bnlab.lab.trained_network import Probe, TrainedNetwork, majority_baseline, or_guess
from bnlab.nets.network import TableNetwork
from bnlab.norm.layers import batch_norm_layers
from bnlab.training.build import TrainingContext

POPULATION, BATCH = "population", "batch"
AVERAGES = {momentum: f"average {momentum:g}" for momentum in (0.5, 0.1, 0.01, 0.001)}
USUAL = (0.1, 0.01)  # the defaults of PyTorch, and of TensorFlow in PyTorch's sense
CORRECTED = {momentum: f"{AVERAGES[momentum]}, corrected" for momentum in USUAL}
ALL = 10_000  # photos that represent the population, if train has more


class EmaStatistics(Probe):
    """Keeps moving averages of several momenta, and evaluates the network by them and by others at some steps."""

    saved = ("averages", "initial", "probed")

    def __init__(self, dataset: Dataset, probes: list[int]) -> None:
        super().__init__()
        self.dataset, self.probes = dataset, probes
        self.averages: dict[float, Tensor] = {}  # momentum -> 2C
        self.initial = torch.empty(0)  # 2C
        self.probed: list[int] = []

    def begin(self, context: TrainingContext) -> None:
        if not self.averages:
            self.initial = read(context.network)
            self.averages = {momentum: self.initial.clone() for momentum in AVERAGES}
        self.initial = self.initial.to(context.device)  # a resumed training has it on the CPU
        self.averages = {momentum: kept.to(context.device) for momentum, kept in self.averages.items()}

    def after(self, step: int, context: TrainingContext) -> None:
        batch = read(context.network)  # 2C
        for momentum, average in self.averages.items():
            average.lerp_(batch, momentum)
        if step + 1 in self.probes:
            self.probe(step + 1, context)

    def probe(self, step: int, context: TrainingContext) -> None:
        """Writes the test accuracy by each kind of statistics after so many steps."""
        self.probed.append(step)
        trained = TrainedNetwork(context=context)
        tried = {AVERAGES[momentum]: average for momentum, average in self.averages.items()}
        tried |= {CORRECTED[momentum]: self.corrected(momentum, step) for momentum in USUAL}
        ways: dict[str, Callable[[], float]] = {
            name: partial(accuracy_by, values, trained) for name, values in tried.items()
        }
        ways[POPULATION] = lambda: accuracy_by(population(trained, ALL), trained)
        ways[BATCH] = lambda: trained.evaluation("test", BATCH).top1
        for statistics, way in ways.items():
            self._add("probes", or_guess(way, majority_baseline(self.dataset)), step=step, statistics=statistics)

    def corrected(self, momentum: float, steps: int) -> Tensor:
        """An average without the part that it still has of its initial values, 2C (as in Adam, Kingma & Ba 2015)."""
        left = (1 - momentum) ** steps
        return (self.averages[momentum] - left * self.initial) / (1 - left)

    def count(self, context: TrainingContext) -> None:
        """Writes, for statistics of ever more photos, the test accuracy and how far they are from those of all."""
        trained, photos = TrainedNetwork(context=context), min(ALL, len(context.loader.paths))
        of_all = population(trained, photos)
        best = accuracy_by(of_all, trained)
        for images in counts(photos):
            values = population(trained, images)
            top1 = accuracy_by(values, trained)
            off = dict(zip(("mean_off", "variance_off"), distances(values, of_all), strict=True))
            self._add("images", top1, images=images, of=photos, **off, against_all=top1 - best)

    def guess(self, steps: list[int]) -> None:
        """Writes the rows of a training that diverged before these steps."""
        guessed, photos = majority_baseline(self.dataset), min(ALL, len(self.dataset.in_split("train")))
        kinds = [*AVERAGES.values(), *CORRECTED.values(), POPULATION, BATCH]
        for step in steps:
            for statistics in kinds:
                self._add("probes", guessed, step=step, statistics=statistics)
        for images in counts(photos):
            nothing = dict.fromkeys(("mean_off", "variance_off", "against_all"))
            self._add("images", guessed, images=images, of=photos, **nothing)

    def _add(self, table: str, top1: float, **row: Value) -> None:
        self.write(table, row | {"top1": top1, "n_test": len(self.dataset.in_split("test"))})


def counts(photos: int) -> list[int]:
    return [*(2**i for i in range(3, math.ceil(math.log2(photos)))), photos]


def read(network: TableNetwork) -> Tensor:
    return torch.cat(_buffers(network))


def _buffers(network: TableNetwork) -> list[Tensor]:
    layers = [layer for _, layer in batch_norm_layers(network) if layer.running_mean is not None]
    return [layer.get_buffer(key) for key in ("running_mean", "running_var") for layer in layers]


def population(trained: TrainedNetwork, images: int) -> Tensor:
    """The population statistics of so many photos of train, 2C. The network keeps its own statistics."""
    with preserving_state(trained.context.network):
        trained.recalibrate(images)
        return read(trained.context.network)


def accuracy_by(values: Tensor, trained: TrainedNetwork) -> float:
    """The test accuracy of the network by these statistics, 2C. It keeps its own statistics."""
    with preserving_state(trained.context.network), torch.no_grad():
        buffers = _buffers(trained.context.network)
        for buffer, part in zip(buffers, torch.split(values, [len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(part)
        return trained.evaluation("test", "running").top1


def distances(values: Tensor, of_all: Tensor) -> tuple[float, float]:
    """How far statistics, 2C, are from others: the root mean squares over the channels of two differences.

    The means differ in standard deviations, the variances by the logarithm of their ratio. Channels without variance,
    such as those of a dead unit, are left out.
    """
    (mean, variance), (true_mean, true_variance) = values.double().chunk(2), of_all.double().chunk(2)  # C each
    live = (variance > 0) & (true_variance > 0)
    if not live.any():
        return 0.0, 0.0
    off = ((mean - true_mean)[live] / true_variance[live].sqrt()).square().mean().sqrt()
    ratio = (variance[live] / true_variance[live]).log().square().mean().sqrt()
    return float(off), float(ratio)
