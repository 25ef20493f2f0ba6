"""Runs a few steps of the training, and counts how often they move the running statistics.

A move is a change of a layer's statistics by one of its forwards; `num_batches_tracked` alone does not tell, since code
that runs a forward again may restore it. Moves that are undone within the step do not count.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._pytree import tree_leaves, tree_map

from bnlab.health.batches import Batch
from bnlab.health.evidence import Evidence
from bnlab.health.gather.modes import differ, statistics_of
from bnlab.health.restore import restored
from bnlab.health.subject import Subject, TrainStep
from bnlab.norm.freeze import Freezable
from bnlab.norm.model_utils import runs_again

STEPS = 4  # of the optimiser, which are run; the median counts, since a GradScaler leaves the first ones out
CALLS = 32  # of train_step at most: so many batches may be accumulated for a step
BATCHES = 8  # that are kept in memory, and used in turn
IMAGES = 16  # of a forward without train_step


@dataclass(frozen=True, kw_only=True)
class LayerSteps:
    """One layer in a usual step of the optimiser."""

    forwards: int
    """in training mode"""
    moves: int
    """how often the running statistics moved, and stayed so"""
    again: int
    """of its forwards, those that backward ran again, as activation checkpointing does"""
    counted: int | None
    """how far num_batches_tracked rose; None: the layer has none"""


@dataclass(frozen=True, kw_only=True)
class TrainingSteps:
    """What steps of the training do to the layers that keep statistics."""

    by_train_step: bool
    """whether these are steps of the caller's train_step, and not one forward in training mode"""
    layers: Mapping[str, LayerSteps]
    """the layers that ran in training mode, by name"""
    evaluated: tuple[str, ...]
    """the layers that ran in evaluation only, although the model was in training"""
    optimizer_steps: int = 0
    """that were seen; 0: a call of train_step counts as a step"""
    calls: int = 1
    """of train_step for a step of the optimiser"""
    forwards: int = 1
    """of the whole model, for a step of the optimiser"""
    weights_changed: bool = False
    """whether weights differed between forwards of the same step, as in sharpness-aware minimisation"""
    batch_size: int = 0
    """images of a batch that train_step gets"""
    normalised_together: int = 0
    """images of one forward of the whole model; 0: it was not run as a whole"""


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Measure "training" and, if the caller gave a train_step, "train_step", which then is the same.

    Raises:
        Exception: whatever the caller's `train_step` raises.
    """
    if isinstance(subject.network, torch.jit.ScriptModule):
        return {}
    if subject.given.train_step is not None:
        found = run_steps(subject, subject.given.train_step)
        return {"training": found, "train_step": found}
    if not subject.layers:
        return {}
    if subject.waits_for_others:
        subject.notes.append(
            "the model was not run in training mode, since its synchronised layers wait for the other processes: pass "
            "train_step= in all of them"
        )
        return {}
    with subject.noting("the model cannot be run in training mode"):
        return {"training": run_forward(subject)}
    return {}


def run_forward(subject: Subject) -> TrainingSteps:
    """Run one forward in training mode, and undo what it changes."""
    batch = subject.batches.sample(IMAGES)
    # parameters, too, because a train() of the caller's own may do more than to set modes
    with restored(subject.model, parameters=True), torch.no_grad():
        _to_training(subject)
        with _Counter(subject).counting() as counter:
            subject.call(batch)
            counter.end_step()
    return counter.result(by_train_step=False, batch_size=len(batch))


def run_steps(subject: Subject, train_step: TrainStep) -> TrainingSteps:
    """Run the caller's training until it made a few steps of the optimiser, and undo what it changes."""
    batches = [batch.whole for batch in _of_usual_size(subject)]
    with ExitStack() as stack:
        stack.enter_context(restored(subject.model, optimizer=subject.given.optimizer, parameters=True))
        _to_training(subject)
        counter = stack.enter_context(_Counter(subject).counting())
        stack.enter_context(_optimizers(subject, counter, stack))
        for whole in islice(cycle(batches), CALLS):
            counter.calls += 1
            train_step(subject.passed, tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, whole))
            counter.end_call()
            if len(counter.steps) >= STEPS:
                break
        if not counter.steps:  # no step of an optimiser was seen, so that each call is taken to be one
            counter.end_step(parts=counter.calls)
    return counter.result(by_train_step=True, batch_size=subject.usual)


def _to_training(subject: Subject) -> None:
    """Set the model to training, unless it was passed so: then some layers may have been set to evaluation."""
    if not subject.modes[""]:
        subject.passed.train()


def _of_usual_size(subject: Subject) -> Iterable[Batch]:
    first = list(islice(iter(subject.batches), BATCHES))  # before the first step, whose randomness might change them
    return [batch for batch in first if len(batch) == subject.usual]


@dataclass
class _Now:
    """One layer since the last step of the optimiser."""

    values: list[dict[str, Tensor]]
    """its statistics at the beginning, and after each move"""
    forwards: int = 0
    again: int = 0
    before: dict[str, Tensor] = field(default_factory=dict)
    """its statistics before the present forward"""

    def undo_to(self, present: Mapping[str, Tensor]) -> None:
        """Forget the moves that were undone since, if the present statistics are those of an earlier time."""
        same = [i for i, value in enumerate(self.values) if not _moved(value, present)]
        if same:
            del self.values[same[-1] + 1 :]


@dataclass(frozen=True)
class _Step:
    layers: Mapping[str, LayerSteps]
    calls: int
    sizes: tuple[int, ...]
    """images of each forward of the whole model"""
    weights_changed: bool


class _Counter:
    """Counts what happens between steps of the optimiser."""

    def __init__(self, subject: Subject) -> None:
        self.network, self.layers = subject.network, subject.layers
        self.steps: list[_Step] = []
        self.optimizer_steps = 0
        self.stepped = False  # the optimiser has made a step since the last forward
        self.calls = 0
        self.evaluated: dict[str, None] = {}
        self.trained: dict[str, None] = {}
        self.start_step()

    def start_step(self) -> None:
        self.now = {name: _Now([statistics_of(layer)]) for name, layer in self.layers.items()}
        self.calls = 0
        self.sizes: list[int] = []
        self.weights: set[int] = set()
        self.stepped = False

    def end_call(self) -> None:
        if self.stepped:
            self.end_step()

    def end_step(self, parts: int = 1) -> None:
        """Close a step; or several steps at once, each a part of what was counted."""
        layers = {name: self._close(name, now, parts) for name, now in self.now.items() if now.forwards}
        sizes = tuple(self.sizes[: len(self.sizes) // parts])
        self.steps.append(_Step(layers, self.calls // parts, sizes, parts == 1 and len(self.weights) > 1))
        self.start_step()

    def _close(self, name: str, now: _Now, parts: int) -> LayerSteps:
        final = statistics_of(self.layers[name])
        count = {key: value for key, value in final.items() if key == "num_batches_tracked"}
        start = now.values[0].get("num_batches_tracked")
        now.undo_to(final)
        return LayerSteps(
            forwards=now.forwards // parts,
            moves=(len(now.values) - 1) // parts,
            again=now.again // parts,
            counted=None if start is None or not count else int(count["num_batches_tracked"] - start) // parts,
        )

    @contextmanager
    def counting(self) -> Iterator["_Counter"]:
        """Within this context, forwards are counted."""
        with ExitStack() as stack:
            whole = self.network.register_forward_pre_hook(self.before_model, prepend=True, with_kwargs=True)
            stack.callback(whole.remove)
            for name, layer in self.layers.items():
                first = layer.register_forward_pre_hook(lambda m, _, name=name: self.before(name, m), prepend=True)
                last = layer.register_forward_hook(lambda m, _, __, name=name: self.after(name, m), always_call=True)
                stack.callback(first.remove)
                stack.callback(last.remove)
            yield self

    def before_model(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        if runs_again() or not network.training:
            return
        self.end_call()
        self.sizes.append(next((len(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.ndim), 0))
        self.weights.add(sum(p._version for p in network.parameters() if not p.is_inference()))

    def before(self, name: str, layer: nn.Module) -> None:
        if not layer.training or (isinstance(layer, Freezable) and layer.frozen):
            if self.network.training:
                self.evaluated[name] = None
            return
        if not runs_again():
            self.end_call()
        self.trained[name] = None
        now = self.now[name]
        now.forwards += 1
        now.again += runs_again()
        now.before = statistics_of(layer)
        now.undo_to(now.before)

    def after(self, name: str, layer: nn.Module) -> None:
        now, before = self.now[name], self.now[name].before
        if not before:
            return
        now.before = {}
        if _moved(before, after := statistics_of(layer)):
            now.values.append(after)

    def result(self, *, by_train_step: bool, batch_size: int) -> TrainingSteps:
        none = LayerSteps(forwards=0, moves=0, again=0, counted=0)

        def usual(name: str) -> LayerSteps:
            found = [step.layers.get(name, none) for step in self.steps]
            counts = [step.counted for step in found if step.counted is not None]
            return LayerSteps(
                forwards=median_low(step.forwards for step in found),
                moves=median_low(step.moves for step in found),
                again=median_low(step.again for step in found),
                counted=median_low(counts) if counts and len(counts) == len(found) else None,
            )

        return TrainingSteps(
            by_train_step=by_train_step,
            layers={name: usual(name) for name in self.trained},
            evaluated=tuple(name for name in self.evaluated if name not in self.trained),
            optimizer_steps=self.optimizer_steps,
            calls=median_low(step.calls for step in self.steps),
            forwards=median_low(len(step.sizes) for step in self.steps),
            weights_changed=median_low(step.weights_changed for step in self.steps),
            batch_size=batch_size,
            normalised_together=median_low([size for step in self.steps for size in step.sizes] or [0]),
        )


def _moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether statistics differ, whatever the counter says."""
    one, other = ({k: v for k, v in values.items() if k != "num_batches_tracked"} for values in (before, after))
    return differ(one, other)


@contextmanager
def _optimizers(subject: Subject, counter: _Counter, stack: ExitStack) -> Iterator[None]:
    """Within this context, steps of optimisers that train the network are noted. What they change is undone, also of
    those that the caller did not pass, and of parameters outside of the network.
    """
    own = set(subject.network.parameters())
    seen: set[Optimizer] = set()
    running: list[Optimizer] = []  # an optimiser may call another one's step()

    def before(optimizer: Optimizer, *_: Any) -> None:
        if optimizer not in seen:
            seen.add(optimizer)
            others = [p for group in optimizer.param_groups for p in group["params"] if p not in own]
            stack.callback(_set_values, [(p, p.detach().clone()) for p in others])
            if optimizer is not subject.given.optimizer:
                stack.enter_context(restored(optimizer=optimizer))
        running.append(optimizer)

    def after(optimizer: Optimizer, *_: Any) -> None:
        running.pop()
        if not running and any(p in own for group in optimizer.param_groups for p in group["params"]):
            counter.optimizer_steps += 1
            counter.stepped = True

    handles = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _set_values(values: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, before in values:
        tensor.copy_(before)
