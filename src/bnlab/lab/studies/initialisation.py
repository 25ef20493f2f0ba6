"""Paper, abstract: "less careful about initialization". At which scales of its first weights a network trains."""

import math
from itertools import pairwise
from typing import Any

from bnlab.errors import plural
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen
from bnlab.lab.plots import BAND, caption, series_by_arm
from bnlab.lab.records import Records, Results, learnt_threshold, number, numbers, seeds, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import Plot

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
_SMALLEST, _LARGEST = -4, 1  # powers of 10


def measure(experiment: Experiment) -> Results:
    """Both networks from each scale, at each learning rate."""
    each = experiment.by_budget(1, 2)  # scales to a decade
    scales = [10 ** (i / each) for i in range(each * _SMALLEST, each * _LARGEST + 1)]
    networks = experiment.by_budget({WITH_BN: "bn_mlp", WITHOUT_BN: "mlp"}, experiment.network_pair())
    same: dict[str, Any] = {
        "activation": "relu",
        "batch_size": 60,
        "steps": experiment.by_budget(150, 3000),
        "schedule": "constant",
        "weight_decay": 0.0,
        "validate_every": 100_000,
    }
    arms = {
        f"{arm}, {scale:.3g}": experiment.recipe(network, initialisation=f"gaussian:{scale:.3g}", **same)
        for arm, network in networks.items()
        for scale in scales
    }
    results = experiment.run_learning_rates(arms, RATES)
    for row in results["accuracy"]:
        network, scale = str(row["arm"]).split(", ")
        row |= {"network": network, "scale": float(scale)}
    return results


def conclude(results: Results) -> Conclusion:
    """How many decades of scale train."""
    ends = _ends(chosen(results))
    bars = {seed: _bar(where(ends, seed=seed)) for seed in seeds(ends)}
    widths = {arm: [_width(where(ends, network=arm, seed=seed), bar) for seed, bar in bars.items()] for arm in _ARMS}
    spacing = math.log10(_scales(ends)[1] / _scales(ends)[0])
    return Conclusion(
        evidence=(
            Evidence(
                what="with BN more decades of the weights' first scale train",
                values=tuple(a - b for a, b in zip(widths[WITH_BN], widths[WITHOUT_BN], strict=True)),
                above=0.0,
                unit="decades",
                resolution=spacing,
            ),
        ),
        plots={
            "accuracy": _plot(ends, "test_top1", "Accuracy by the scale of the first weights", "right on test, %"),
            "learning-rate": _plot(ends, "learning_rate", "The learning rate that suits it best", "learning rate"),
        },
        numbers={f"decades that train, {arm}, mean": sum(width) / len(width) for arm, width in widths.items()},
        remarks=_remarks(_ends(results["accuracy"]))
        + tuple(
            f"seed {seed}: neither network learnt from any scale, so it shows nothing"
            for seed, bar in bars.items()
            if math.isnan(bar)
        ),
    )


_ARMS = (WITH_BN, WITHOUT_BN)


def _ends(rows: Records) -> Records:
    """The last judgement of each training."""
    last = {(row["arm"], row["learning_rate"], row["seed"]): row for row in rows}
    return list(last.values())


def _scales(rows: Records) -> list[float]:
    return sorted(set(numbers(rows, "scale")))


def _bar(rows: Records) -> float:
    """The accuracy from which a seed's networks count as trained, either of them; NaN where none learnt anything."""
    guess, best = number(rows[0], "guess"), max(numbers(rows, "test_top1"))
    return (guess + best) / 2 if best > learnt_threshold(rows[0]) else math.nan


def _width(rows: Records, bar: float) -> float:
    """Decades of scale at which a network's accuracy lies above the bar.

    Between two scales the accuracy is taken to run straight over the logarithm of the scale.
    """
    if not rows or math.isnan(bar):
        return math.nan
    points = sorted((math.log10(number(row, "scale")), number(row, "test_top1")) for row in rows)
    width = 0.0
    for (left, low), (right, high) in pairwise(points):
        below, above = sorted((low, high))
        if above > bar:
            share = 1.0 if below >= bar else (above - bar) / (above - below)
            width += share * (right - left)
    return width


def _remarks(rows: Records) -> tuple[str, ...]:
    sentences = []
    for arm in _ARMS:
        here = where(rows, network=arm)
        diverged = sum(row["diverged_at"] is not None for row in here)
        sentences.append(f"{arm}: {plural(diverged, 'training')} of {len(here)} diverged")
        best = where(here, chosen=1)
        for rate, end in ((min(RATES), "lowest"), (max(RATES), "highest")):
            scales = sorted({number(row, "scale") for row in best if row["learning_rate"] == rate})
            if scales:
                at = ", ".join(f"{scale:g}" for scale in scales)
                sentences.append(f"{arm}: the best learning rate was the {end} tried ({rate:g}) at scales of {at}")
    return tuple(sentences)


def _plot(rows: Records, column: str, title: str, y: str) -> Plot:
    is_share = column == "test_top1"
    return Plot(
        title=title,
        x="standard deviation of the first weights",
        y=y,
        series=series_by_arm(rows, "scale", column, arm="network", times=100 if is_share else 1),
        caption=caption(rows, BAND),
        table="accuracy",
        log_x=True,
        log_y=not is_share,
    )


STUDY = Study(
    name="initialisation",
    title="The scale of the first weights",
    claim="""With batch normalisation one can be "less careful about initialization": a network trains from first
    weights of more scales.""",
    source="Ioffe & Szegedy 2015, abstract and sec. 3.3",
    protocol="""Three hidden layers of 100 rectified units (full: small Inception, or GoogLeNet on photos), with and
    without BN, their first weights from N(0, s^2) with s from 0.0001 to 10 in decades (full: half decades); the
    last layer's from N(0, 0.01^2), as always here. 150 steps (full: 3000) of gradient descent with momentum 0.9 on
    batches of 60, at a constant learning rate: the best of 0.000001 to 1 in decades by val accuracy, chosen for
    each network, scale and seed: with weights too large for the usual rates, a network without BN trains at a small
    one. A scale trains if the accuracy on test lies above halfway from guessing to the best of the seed over all scales
    and both networks, so that one bar holds for both; a seed whose best is no better than guessing shows
    nothing.""",
    rule="""One clause: the decades of scale that train (by one bar for both networks), with BN less without, are above
    0, by their 95% interval over seeds, which is no narrower than one step of the grid to either side.""",
    measure=measure,
    conclude=conclude,
)
