"""Trainings by a simulated clock: loop and budget are real, and steps, validations and photos only take time."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bnlab.errors import UsageError
from bnlab.machine import usable_cores
from bnlab.recipe import Recipe
from bnlab.training import loop
from bnlab.training import time_budget as module
from bnlab.training.schedule import Plan
from bnlab.training.state import MetricAccumulator, TrainState
from bnlab.training.time_budget import TimeBudget
from tests.conftest import Notes
from tests.training.test_run import command

Load = Callable[[float], float]


@dataclass
class Machine:
    """Work takes `load(now)` times as many seconds as on an idle machine; `now` is 0 at the start of the call."""

    load: Load = lambda now: 1.0
    step: float = 0.1  # seconds of a step at 64 px; half of them at 32 px
    batches: int = 10
    reading: float = 0.0  # seconds that the photos of a batch take the first time
    validation: float = 0.3
    later_validations: float = 1.0  # how much longer these take than those before the training
    report: float = 0.2
    opening: float = 0.5  # seconds before anything else
    suspended: tuple[float, float] = (1e9, 0.0)  # when, and for how long
    gpu: bool = False  # steps are queued, and take their time when something waits for them
    queued: float = 0.0
    now: float = 0.0
    read: set[int] = field(default_factory=set)
    sizes: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    validated: list[int] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        while seconds > 0:
            part = min(seconds, 0.05)
            self.now += part * self.load(self.now)
            seconds -= part
        if self.now >= self.suspended[0]:
            self.now += self.suspended[1]
            self.suspended = 1e9, 0.0

    # What TimeBudget and fit use of a loader:

    paths = range(80)

    def epoch(self, epoch: int, size: int, start: int = 0) -> Iterator[tuple[int, list[int]]]:
        for batch in range(start, self.batches):
            if batch not in self.read:
                self.work(self.reading)
                self.read.add(batch)
            yield size, [0] * 8

    def train_step(self, context: object, size: int, labels: object, step: int) -> tuple["Loss", torch.Tensor]:
        seconds = self.step * (1 / 3 + 2 / 3 * size**2 / 64**2)
        self.work(seconds / 100 if self.gpu else seconds)
        self.queued += seconds if self.gpu else 0.0
        return Loss(self), torch.tensor(1)

    def wait(self) -> None:
        self.work(self.queued)
        self.queued = 0.0

    def validate(self, progress: object = None) -> SimpleNamespace:
        self.wait()
        self.work(self.validation)
        evaluation = SimpleNamespace(loss=1.0, top1=0.5)
        return SimpleNamespace(evaluation=evaluation, running=evaluation, seconds=self.validation / 3)


class Loss:
    """The loss of a step; a GPU makes the step before it gives the number."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def item(self) -> float:
        self.machine.wait()
        return 1.0


class Accumulator(MetricAccumulator):
    def read(self) -> None:
        if self._pending:
            self._pending[0][0].machine.wait()  # type: ignore[attr-defined]
        self._pending = [(torch.tensor(1.0), num_correct, images) for _, num_correct, images in self._pending]
        super().read()


@dataclass
class Outcome:
    used: float  # fraction of the time
    state: TrainState
    progress: Notes


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    monkeypatch.setattr(loop, "set_learning_rate", lambda machine, rate: machine.rates.append(rate))
    monkeypatch.setattr(loop, "MetricAccumulator", Accumulator)
    monkeypatch.setattr(module, "scratch_copy", lambda context: context)

    def train(machine: Machine, seconds: float, *, budget: bool = True, **changes: Any) -> Outcome:
        for part in (loop, module):
            monkeypatch.setattr(part, "time", machine)
            monkeypatch.setattr(part, "train_step", machine.train_step)
        monkeypatch.setattr(torch.cuda, "synchronize", machine.wait)
        device = "cuda" if machine.gpu else "cpu"
        recipe = Recipe.model_validate({"size": 64, "checkpoint_seconds": 1e9} | changes)
        context: Any = SimpleNamespace(
            recipe=recipe, loader=machine, device=device, optimizer=machine, network=torch.nn.Identity()
        )
        progress, state = Notes(), TrainState(plan=Plan.of(recipe, machine.batches))
        machine.work(machine.opening)
        time_budget = TimeBudget(0.0, seconds, device)
        if budget:
            state.plan, state.step_times = time_budget.planned(
                context, machine.validate, lambda result: machine.work(machine.report), progress
            )
            machine.validation *= machine.later_validations

        def validate() -> SimpleNamespace:
            began, result = machine.now, machine.validate()
            if budget:
                time_budget.validated(state, machine.now - began)
            machine.validated.append(state.epoch + 1)
            return result

        def replanned(state: TrainState) -> Plan:
            machine.sizes.append(state.size)  # of the step before
            return time_budget.replanned(state, recipe, progress) if budget else state.plan.repeated(recipe, state.step)

        callbacks = loop.Callbacks(
            validate=validate, save=lambda state: None, epoch_done=lambda *_: None, replanned=replanned
        )
        loop.fit(context, state, callbacks, progress=progress)
        machine.work(machine.validation / 3 + machine.report)
        machine.now += min(1.2, 0.1 * seconds)  # the process ends
        assert state.step == state.plan.steps
        assert state.rows[-1]["size"] == recipe.size
        assert state.rows[-1]["val_top1"] is not None
        assert machine.rates[-1] == pytest.approx(1e-4 * recipe.learning_rate)
        return Outcome(machine.now / seconds, state, progress)

    return train


# How much slower the machine is, by the fraction of the time that has passed.
LOADS: dict[str, Load] = {
    "idle": lambda now: 1.0,
    "while it plans": lambda now: 3.0 if now < 0.1 else 1.0,
    "at the beginning": lambda now: 3.0 if now < 0.3 else 1.0,
    "in the middle": lambda now: 2.0 if 0.4 < now < 0.7 else 1.0,
    "at the end": lambda now: 2.0 if now > 0.7 else 1.0,
    "in the last moments": lambda now: 2.0 if now > 0.9 else 1.0,
    "comes and goes": lambda now: 2.5 if (8 * now) % 1 < 0.5 else 1.0,
    "comes and goes often": lambda now: 2.5 if (50 * now) % 1 < 0.5 else 1.0,
    "always slower": lambda now: 1 + 2 * now,
    "always faster": lambda now: 1 / (1 + 2 * now),
}


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("load", LOADS)
def test_whatever_the_load_it_ends_on_time_and_can_be_repeated(
    train: Callable[..., Outcome], load: str, every: int
) -> None:
    machine = Machine(load=lambda now: LOADS[load](now / 60), reading=0.1)
    timed = train(machine, 60.0, validate_every=every)
    assert 0.95 <= timed.used <= 1

    other = Machine(load=lambda now: 1 + now % 2)
    again = train(other, 60.0, budget=False, plan=timed.state.plan.changes)
    assert again.state.plan == timed.state.plan
    assert (other.rates, other.sizes, other.validated) == (machine.rates, machine.sizes, machine.validated)


def test_on_an_idle_machine_the_first_plan_stays(train: Callable[..., Outcome]) -> None:
    """Also while photos are read for the first time: that takes as long as it took before the training."""
    machine = Machine(reading=0.2)
    timed = train(machine, 60.0)
    assert timed.state.plan.changes == ((0, timed.state.step, 8),)
    assert timed.progress.warnings == []
    assert 0.965 < timed.used < 0.985
    assert len(machine.validated) == 9


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize(
    "machine",
    [
        {"later_validations": 3.0},
        {"later_validations": 0.3},
        {"validation": 1.0, "batches": 2},  # an epoch takes less than its validation
        {"reading": 1.0},
        {"reading": 0.5, "batches": 400},  # most of the time is the first epoch
        {"batches": 400, "load": lambda now: 3.0 if now > 20 else 1.0},  # one and a half epochs become less than one
        {"suspended": (12.0, 12.0)},
        {"suspended": (30.0, 18.0)},
        {"suspended": (50.0, 5.0)},
        {"step": 2.0},
        {"step": 0.01},
        {"opening": 25.0},
        {"gpu": True},
        {"gpu": True, "load": lambda now: 2.0 if 20 < now < 40 else 1.0},
    ],
    ids=" ".join,
)
def test_whatever_the_machine_it_ends_on_time(
    train: Callable[..., Outcome], machine: dict[str, Any], every: int
) -> None:
    timed = train(Machine(**machine), 60.0, validate_every=every)
    assert 0.95 <= timed.used <= 1
    # A GPU's speed is measured when it has made its steps: 8 photos in at least 0.05 s.
    assert all((row["images_per_second"] or 0) <= 161 / machine.get("step", 0.1) / 10 for row in timed.state.rows)


@pytest.mark.parametrize("seconds", [6.0, 10.0])
def test_in_a_short_time_few_steps_fit(train: Callable[..., Outcome], seconds: float) -> None:
    timed = train(Machine(step=0.25), seconds)
    assert timed.state.step < 30
    assert 0.95 <= round(timed.used, 6) <= 1


def test_steps_that_are_longer_than_the_window_end_it_within_one_step(train: Callable[..., Outcome]) -> None:
    timed = train(Machine(step=6.0, load=lambda now: 1.5 if 90 < now < 110 else 1.0), 120.0)
    assert 0.99 - 6 / 120 <= timed.used <= 1


def test_what_follows_the_last_step_is_late_by_no_more_than_it_is_slowed_down(train: Callable[..., Outcome]) -> None:
    timed = train(Machine(load=lambda now: 2.0 if now > 9.4 else 1.0), 10.0)
    last = 0.3 + 0.3 / 3 + 0.2  # a validation, the evaluation of the best classifier, the report
    assert timed.used <= 0.98 + last / 10


def test_a_validation_of_the_user_is_left_out_where_much_time_would_remain_unused(
    train: Callable[..., Outcome],
) -> None:
    """Of 40 s and the end of the process, a validation takes 3 s, and with the epoch before it 6 s."""
    machine = Machine(batches=30, validation=3.0, opening=3.0)
    timed = train(machine, 41.2, validate_every=1)
    assert machine.validated == [1, 2, 3, 4, 6]
    assert [warning.split(":")[0] for warning in timed.progress.warnings] == ["a validation is left out"]
    assert timed.used >= 0.95


def test_a_validation_of_the_user_that_the_first_plan_leaves_out_is_warned_of(train: Callable[..., Outcome]) -> None:
    """Also if the plan is never changed."""
    timed = train(Machine(batches=30, validation=8.0, opening=3.0), 60.0, validate_every=1)
    warnings = [warning for warning in timed.progress.warnings if "validation" in warning]
    assert warnings == ["a validation is left out: validate_every 1 does not fit into the time"]


def test_a_time_in_which_not_one_step_fits_is_refused(train: Callable[..., Outcome]) -> None:
    with pytest.raises(UsageError, match=r"not one step fits into 4 s: one takes 1\.00 s, .*: give more time"):
        train(Machine(step=1.0), 4.0)


def test_a_resumed_training_goes_on_adapting(train: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """From the speed it had: a plan made by a machine that was three times as slow is not shortened at first."""
    machine, recipe = Machine(load=lambda now: 3.0 if now < 10 else 1.0), Recipe(size=64)
    timed = train(machine, 60.0)
    state = replace(timed.state, step=60, epoch=6, batch=0, plan=timed.state.plan)
    assert state.step_times.slowness < 0.5
    machine.now = 500.0
    end = 500 + state.step_times.seconds(state.plan, recipe, epoch=6, step=60) / 0.975
    resumed = TimeBudget(end - 60, 60.0, "cpu")
    assert resumed.replanned(state, recipe, Notes()) == state.plan


@pytest.mark.slow
def test_a_real_training_on_a_machine_that_is_busy_at_first_ends_about_on_time(data: Path) -> None:
    """Of 40 s, processes on all cores take part in the first 15. The bounds are wide: other tests may run as well."""
    began = time.monotonic()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(usable_cores())]
    try:
        process = command(data.parent, "data", "--time", "40", "--size", "64", "--set", "width=0.25")
        time.sleep(15)
    finally:
        for other in others:
            other.kill()
            other.wait()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert 0.85 <= (time.monotonic() - began) / 40 <= 1.1
