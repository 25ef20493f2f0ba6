"""Runs all images through the network: by running, by batch and by population statistics.

The images are read twice. The first time, each batch is run twice: by the running statistics, as in evaluation, and by
batch statistics, as in training but without dropout; both times the inputs of the layers are measured. The second time,
the network normalises by the population statistics that the batches gave. Memory does not grow with the number of
batches, but for the scores.

All arithmetic of a batch is done for all layers at once: their channels lie one after the other in one array of
T = C1 + C2 + ... channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bnlab.health.batches import Batch, Batches
from bnlab.health.evidence import Floats, Sample, Scores
from bnlab.health.gather.positives import counting
from bnlab.health.gather.recorder import Recorder
from bnlab.health.gather.statistics_switch import StatisticsSwitch, Which
from bnlab.norm import moments, own_forward
from bnlab.norm.freeze import Freezable
from bnlab.norm.layers import StatisticsMode
from bnlab.norm.recalibrate import StopForward, evaluation_mode
from bnlab.progress import Task

_BatchNormBase = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Passes:
    """What the passes over all images gave."""

    scores: Scores | None
    evaluation: Mapping[str, Sample]
    """the inputs of each layer where all normalise by their running statistics"""
    batch: Mapping[str, Sample]
    """the inputs of each layer where all normalise by batch statistics"""
    population: Mapping[str, tuple[Tensor, Tensor]]
    """population means and variances by layer, as its buffers store them"""
    images: int
    batch_sizes: tuple[int, ...]
    labels: Tensor | None
    """of all images, where each image has one"""
    single: Mapping[str, int]
    """how many batches had one value for each channel at a layer, by name, where there was one"""
    not_finite: frozenset[str]
    """the layers that got values that are not finite"""
    positives: Mapping[str, Floats]
    """by layer, how many outputs of each channel are not at most 0 in evaluation; NaN: not counted"""


@torch.no_grad()
def run_passes(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Batches,
    task: Task,
    count: Mapping[str, NDArray[np.bool_]] | None = None,
) -> Passes:
    """Run all images through the network as the file's docstring says. The caller restores the model.

    `count` gives channels whose positive outputs are counted, by layer.
    """
    switch = StatisticsSwitch(layers)
    evaluation, batch = Recorder(layers, images=True), Recorder(layers, images=False)
    positives = {name: np.where(channels, 0.0, np.nan) for name, channels in (count or {}).items() if channels.any()}
    running, by_batch, again = _ScoreList(), _ScoreList(), _ScoreList()
    sizes: list[int] = []
    labels: list[Tensor] = []
    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(_single_values_pass(switch))
        with (
            measuring(layers, switch, evaluation, batch),
            counting(layers, positives, lambda: switch.which == "running"),
        ):
            for one in batches:
                switch.to("running")
                running.add(batches, network, one)
                evaluation.end_batch(len(one))
                switch.to("batch")
                by_batch.add(batches, network, one)
                batch.end_batch(len(one))
                sizes.append(len(one))
                if one.labels is not None and one.labels.ndim == 1:
                    labels.append(one.labels.cpu())
                task.advance(2 * len(one))
        evaluated, measured = evaluation.samples(), batch.samples()
        population = batch.population(switch)
        if population:
            switch.to("population", population)
            for one in batches:
                again.add(batches, network, one)
                task.advance(len(one))
        switch.to("running")
    scores = Scores(
        running=running.all(),
        batch=by_batch.all(),
        population=again.all() if population else None,
        kind=batches.kind,
    )
    return Passes(
        scores=None if scores.running is None else scores,
        evaluation=evaluated,
        batch=measured,
        population=population,
        images=sum(sizes),
        batch_sizes=tuple(sizes),
        labels=torch.cat(labels) if sum(map(len, labels)) == sum(sizes) else None,
        single=batch.single,
        not_finite=evaluation.not_finite | batch.not_finite,
        positives=positives,
    )


@torch.no_grad()
def measure_inputs(
    network: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    call: Callable[[Batch], object],
    which: Which = "running",
    stop: str | None = None,
) -> tuple[dict[str, Sample], dict[str, tuple[Tensor, Tensor]]]:
    """The inputs of layers over some batches, and the statistics that these would give the layers, as in `Passes`.

    With `stop`, the first call of that layer ends each forward. The caller restores the model.
    """
    switch, recorder = StatisticsSwitch(layers), Recorder(layers, images=False)

    def end(*_: object) -> None:
        raise StopForward

    with ExitStack() as stack:
        stack.enter_context(evaluation_mode(network))
        stack.enter_context(measuring(layers, switch, recorder, recorder))
        if stop is not None:
            stack.callback(layers[stop].register_forward_pre_hook(end).remove)
        switch.to(which)
        for batch in batches:
            with suppress(StopForward):
                call(batch)
            recorder.end_batch(len(batch))
        switch.to("running")
    return recorder.samples(), recorder.population(switch)


class _ScoreList:
    """The scores of one way to run the network."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    def add(self, batches: Batches, network: nn.Module, batch: Batch) -> None:
        score = batches.score(batches.call(network, batch), batch)
        if score is not None:
            self.parts.append(score)

    def all(self) -> Floats | None:
        return torch.cat(self.parts).numpy() if self.parts else None


@contextmanager
def _single_values_pass(switch: StatisticsSwitch) -> Iterator[None]:
    """Let layers without statistics take a batch with one value for each channel, which torch refuses also in
    evaluation. The value is then its own mean.
    """
    without = [n for n, layer in switch.layers.items() if isinstance(layer, _BatchNormBase)]
    without = [name for name in without if switch.buffers[name].get("running_mean") is None]

    def hook(name: str, layer: nn.Module, args: Any) -> None:
        layer._buffers.update(switch.buffers[name])
        if args and args[0].numel() == args[0].shape[1]:
            mean = args[0].detach().flatten()
            layer._buffers.update(running_mean=mean, running_var=torch.ones_like(mean))
            if isinstance(layer, StatisticsMode):
                layer._statistics = "running"  # until `to` sets it for the next batch

    with ExitStack() as stack:
        for name in without:
            layer = switch.layers[name]
            handle = layer.register_forward_pre_hook(lambda module, args, name=name: hook(name, module, args))
            stack.callback(handle.remove)
        yield


@contextmanager
def measuring(
    layers: Mapping[str, nn.Module], switch: StatisticsSwitch, evaluation: "Recorder", batch: "Recorder"
) -> Iterator[None]:
    """Within this context, each forward measures the inputs of the layers."""
    own = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, _BatchNormBase) and own_forward.normalises(layer) != "its input"
    }

    def hook(name: str, layer: nn.Module, args: Any, kwargs: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if name in own:
            inputs = own_forward.normalised_inputs(own[name], *args, **kwargs)
            x = inputs[0] if inputs else x
        if not x.numel():
            return
        if switch.which == "running":
            evaluation.add(name, x, moments.measure(x))
            return
        found = moments.measure(x)
        batch.add(name, x, found)
        if found.count == 1:
            batch.single[name] = batch.single.get(name, 0) + 1
            layer._buffers.update(switch.buffers[name])
        elif name in switch.replaces and not (isinstance(layer, Freezable) and layer.frozen):
            switch.replace(name, found)

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: hook(name, module, args, kwargs), with_kwargs=True, prepend=True
            )
            stack.callback(handle.remove)
        yield
