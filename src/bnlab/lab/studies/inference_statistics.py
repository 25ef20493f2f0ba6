"""Paper, Alg. 2, and Wu & Johnson 2021: population statistics against moving averages, and from how many photos."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnlab.data.source import Source, open_recorded_data
from bnlab.lab.bench import WITH_BN, Bench
from bnlab.lab.cells import Place
from bnlab.lab.course import Course, Witness, train
from bnlab.lab.plots import BAND, caption, over_seeds, series_of
from bnlab.lab.records import Records, Row, Tables, by_seed, last, number, numbers, resolution, seeds, where
from bnlab.lab.statistics import accuracy_by, distances, or_guess, population, read
from bnlab.lab.study import Findings, Study
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot
from bnlab.training.loop import Trainee

POPULATION, BATCH = "population", "batch"
MOMENTA = (0.5, 0.1, 0.01, 0.001)
_USUAL = (0.1, 0.01)  # the defaults of PyTorch, and of TensorFlow in PyTorch's sense
_ALL = 10_000  # photos that stand for the population, where train has more
_SUFFICE = 1024  # photos that are claimed to
_AT_WORST, _OF_FEWER = -2.0, -1.0  # points: margins, see the rule


def measure(bench: Bench) -> Tables:
    """One training a seed: statistics do not change how a network trains, so all kinds are compared on the same."""
    recipe = bench.recipe(bench.twins()[WITH_BN], steps=bench.pick(250, 20_000), judge_every=1_000_000).model_copy(
        update={"norm_momentum": 1.0}
    )  # what the layers then keep is the last batch's statistics, as they are
    probes = bench.pick((5, 20, 50, 100, 200), (5, 20, 100, 500, 2000, 10_000))
    return bench.run(bench.cells({"one": recipe}, probed, probes=list(probes)))


def probed(place: Place, recipe: Recipe, probes: list[int]) -> Tables:
    """One training, its network evaluated after so many steps and at its end."""
    witness = Averages(open_recorded_data(place.split), probes)
    course = train(place, recipe, witness=witness)
    end = int(number(course.tables["accuracy"][-1], "step"))
    if course.diverged:
        witness.guess([step for step in (*probes, end) if step not in witness.probed and step <= end])
    else:
        if end not in witness.probed:
            witness.probe(end, course.trainee)
        witness.count(course.trainee)
    return {name: course.tables[name] for name in ("accuracy", "probes", "images")}


class Averages(Witness):
    """Moving averages of the batches' statistics, of several momenta; they and others are tried at some steps."""

    def __init__(self, source: Source, probes: list[int]) -> None:
        super().__init__()
        self.source, self.probes = source, probes
        self.averages: dict[float, Tensor] = {}  # by momentum: 2C, all layers' means, then their variances
        self.initial = torch.empty(0)  # 2C
        self.probed: list[int] = []

    def begin(self, trainee: Trainee) -> None:
        """Begin with what the layers begin with."""
        if not self.averages:
            self.initial = read(trainee.network)
            self.averages = {momentum: self.initial.clone() for momentum in MOMENTA}

    def after(self, step: int, trainee: Trainee) -> None:
        """Take in the batch, and try all statistics where it is time."""
        batch = read(trainee.network)  # 2C
        for momentum, average in self.averages.items():
            average.lerp_(batch, momentum)
        if step + 1 in self.probes:
            self.probe(step + 1, trainee)

    def probe(self, step: int, trainee: Trainee) -> None:
        """Rows on the test accuracy by each kind of statistics, after so many steps."""
        self.probed.append(step)
        tried = {f"average {momentum:g}": average for momentum, average in self.averages.items()}
        tried |= {f"average {momentum:g}, corrected": self.corrected(momentum, step) for momentum in _USUAL}
        course = Course(trainee=trainee, source=self.source, tables={}, diverged=False)
        ways: dict[str, Callable[[], float]] = {
            name: partial(accuracy_by, values, trainee, self.source) for name, values in tried.items()
        }
        ways[POPULATION] = lambda: accuracy_by(population(trainee, _ALL), trainee, self.source)
        ways[BATCH] = lambda: course.evaluation("test", BATCH).top1
        for statistics, way in ways.items():
            self._write(step, statistics, or_guess(way, len(self.source.classes)))

    def corrected(self, momentum: float, steps: int) -> Tensor:
        """An average without its share of what it began with, 2C (as Adam corrects its own, Kingma & Ba 2015)."""
        left = (1 - momentum) ** steps
        return (self.averages[momentum] - left * self.initial) / (1 - left)

    def count(self, trainee: Trainee) -> None:
        """Rows on the statistics of ever more photos: test accuracy, and how far they are from those of all."""
        photos = min(_ALL, len(trainee.loader.paths))
        whole = population(trainee, photos)
        best = accuracy_by(whole, trainee, self.source)
        for images in counts(photos):
            values = population(trainee, images)
            mean_off, variance_off = distances(values, whole)
            top1 = accuracy_by(values, trainee, self.source)
            row: Row = {"images": images, "of": photos, "mean_off": mean_off, "variance_off": variance_off}
            self._add("images", row | {"against_all": top1 - best}, top1)

    def guess(self, steps: list[int]) -> None:
        """Rows for a training that diverged before these steps."""
        chance, photos = 1 / len(self.source.classes), min(_ALL, len(self.source.side("train")))
        kinds = [f"average {m:g}" for m in MOMENTA] + [f"average {m:g}, corrected" for m in _USUAL]
        for step in steps:
            for statistics in (*kinds, POPULATION, BATCH):
                self._write(step, statistics, chance)
        for images in counts(photos):
            row: Row = {"images": images, "of": photos, "mean_off": None, "variance_off": None}
            self._add("images", row | {"against_all": 0.0}, chance)

    def state_dict(self) -> dict[str, Any]:
        """With the averages."""
        own = {"averages": self.averages, "initial": self.initial, "probed": self.probed}
        return super().state_dict() | own

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Stand where it stood."""
        super().load_state_dict(state)
        self.averages, self.initial, self.probed = state["averages"], state["initial"], state["probed"]

    def _write(self, step: int, statistics: str, top1: float) -> None:
        self._add("probes", {"step": step, "statistics": statistics}, top1)

    def _add(self, table: str, row: Row, top1: float) -> None:
        self.write(table, row | {"top1": top1, "n_test": len(self.source.side("test"))})


def counts(photos: int) -> list[int]:
    """How many photos are tried: 8, 16, 32 ... and all."""
    return [*(2**i for i in range(3, math.ceil(math.log2(photos)))), photos]


def judge(tables: Tables) -> Findings:
    """Population statistics against the usual averages, and few photos against all."""
    probes, images = tables["probes"], tables["images"]
    points: dict[str, Any] = {"unit": "points", "resolution": resolution(probes)}
    clauses = []
    for momentum in _USUAL:
        average = f"average {momentum:g}"
        least = tuple(min(0.0, *gains) for gains in _gains(probes, average))
        clauses += [
            Evidence(
                what=f"at its worst probed step population is at least as good as the moving average of {momentum:g}",
                values=least,
                above=_AT_WORST,
                **points,
            ),
            _on_the_way(probes, average, points, decides=True),
            _on_the_way(probes, f"{average}, corrected", points, decides=False),
        ]
    few = _few(images)
    clauses.append(
        Evidence(
            what=f"statistics of {few} photos are as good as those of all",
            values=tuple(100 * loss for loss in by_seed(images, last("against_all"), images=few)),
            above=_OF_FEWER,
            **points,
        )
    )
    return Findings(
        evidence=tuple(clauses),
        plots={"accuracy": _accuracy(probes), "photos": _photos(images), "distance": _distance(images)},
        numbers={
            f"test accuracy at the end, {statistics}, %": 100 * _mean(where(_last(probes), statistics=statistics))
            for statistics in (POPULATION, BATCH, *(f"average {m:g}" for m in MOMENTA))
        },
        remarks=_remarks(tables, few),
    )


def _gains(probes: Records, statistics: str) -> list[list[float]]:
    """By how many points population statistics are ahead at each probed step, seed by seed."""
    return [
        [100 * (a - b) for a, b in zip(*(_top1(probes, kind, seed) for kind in (POPULATION, statistics)), strict=True)]
        for seed in seeds(probes)
    ]


def _top1(probes: Records, statistics: str, seed: int) -> list[float]:
    return numbers(where(probes, statistics=statistics, seed=seed), "top1")


def _on_the_way(probes: Records, average: str, points: dict[str, Any], *, decides: bool) -> Evidence:
    values = tuple(sum(gains[:-1]) / max(1, len(gains) - 1) for gains in _gains(probes, average))
    what = f"on the way population is better than the moving {average.replace('average', 'average of', 1)}"
    return Evidence(what=what, values=values, above=0.0, decides=decides, **points)


def _few(images: Records) -> int:
    """What is claimed to suffice, or, where that is more than half of all, the most that is not."""
    half = min(min(numbers(images, "of")) / 2, _SUFFICE)
    return int(max(n for n in numbers(images, "images") if n <= half))


def _last(probes: Records) -> Records:
    return where(probes, step=max(numbers(probes, "step")))


def _mean(rows: Records) -> float:
    return sum(numbers(rows, "top1")) / len(rows)


def _remarks(tables: Tables, few: int) -> tuple[str, ...]:
    sentences = []
    if few < _SUFFICE:
        sentences.append(
            f"train has too few photos to hold {_SUFFICE} against: {few} were, which is harder, so that a failure at "
            f"{few} would say nothing of {_SUFFICE}"
        )
    diverged = [row for row in tables["accuracy"] if row["diverged_at"] is not None]
    if diverged:
        sentences.append(f"trainings that diverged: {len(diverged)}")
    return tuple(sentences)


def _accuracy(probes: Records) -> Plot:
    """Population and batch first; an average that was corrected in the colour of the one that was not."""
    kinds = [POPULATION, BATCH, *(f"average {momentum:g}" for momentum in MOMENTA)]
    found = {series.name: series for series in over_seeds(probes, "step", "top1", arm="statistics", times=100)}
    corrected = [replace(s, colour=kinds.index(s.name.split(",")[0])) for s in found.values() if s.name not in kinds]
    return Plot(
        title="Test accuracy on the way by kind of statistics",
        x="steps",
        y="right on test, %",
        series=(*(found[kind] for kind in kinds), *corrected),
        caption=caption(probes, BAND),
        table="probes",
        log_x=True,
    )


def _photos(images: Records) -> Plot:
    rows = [row for row in images if row["images"] != row["of"]]
    return Plot(
        title="What statistics of so many photos lose against those of all",
        x="photos of train that were measured",
        y="accuracy less that by all, points",
        series=(series_of("population", rows, "images", "against_all", times=100),),
        caption=caption(images, f"at the end of training; {BAND}"),
        table="images",
        lines=((0.0, "as by all"),),
        log_x=True,
    )


def _distance(images: Records) -> Plot:
    rows = [row for row in images if row["images"] != row["of"]]
    return Plot(
        title="How far statistics of so many photos are from those of all",
        x="photos of train that were measured",
        y="root mean square over channels",
        series=(
            series_of("means, in standard deviations", rows, "images", "mean_off"),
            series_of("variances, logarithm of the ratio", rows, "images", "variance_off"),
        ),
        caption=caption(images, f"at the end of training; {BAND}"),
        table="images",
        log_x=True,
        log_y=True,
    )


STUDY = Study(
    name="inference-statistics",
    title="What inference normalises by",
    claim="""Population statistics, measured with the weights fixed on 1,000 to 10,000 photos, are at least as good for
    inference as the moving averages of training at any time, and better on the way.""",
    source="Ioffe & Szegedy 2015, Alg. 2; Wu & Johnson 2021 (arXiv 2105.07576)",
    protocol="""One training a seed: statistics for inference do not change how a network trains, so all kinds are
    compared on the same weights. Moving averages of momentum 0.5, 0.1 (PyTorch's default), 0.01 (TensorFlow's) and
    0.001 (the weight of the new batch) are kept beside it, from the usual beginning of 0 and 1. After 5, 20, 50, 100,
    200 and 250 steps of 32 photos (full: 5, 20, 100, 500, 2,000, 10,000 and 20,000) the network is evaluated on test
    by each, by population statistics of all of train (10,000 photos at most) and by each batch's own; beside these by
    the averages of 0.1 and 0.01 without their share of what they began with. At the end population statistics are
    measured on 8, 16, 32 ... photos too. The paper averages over augmented training batches; here photos are measured
    as inference sees them, as bnlab does. The learning rate is the recipe's; nothing is chosen.""",
    rule=f"""Five clauses, each by its 95% interval over seeds. For the averages of 0.1 and of 0.01: the least
    difference over the probed steps (population less average; 0 where none is below) is above {_AT_WORST:g} points, for
    among some 500 test photos the least of six differences is about 1 below 0 where both are equally good; and its mean
    over the steps before the last is above 0. And {_SUFFICE:,} photos (or, where half of train is fewer, the largest
    power of two up to that half) lose less than {-_OF_FEWER:g} point against all: what two seeds differ by.""",
    measure=measure,
    judge=judge,
    least=200,
)
