"""Paper, abstract: "less careful about initialization". From which scales of its first weights a network trains."""

import math
from itertools import pairwise

from bnlab.errors import plural
from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.plots import BAND, accuracy_curves, caption, series_by_arm
from bnlab.lab.records import Records, Results, last_rows, learnt_threshold, number, numbers, seeds, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import Plot

RATES = (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0)
_SMALLEST, _LARGEST = -4, 1  # powers of 10
_NETWORKS = (WITH_BN, WITHOUT_BN)


def measure(experiment: Experiment) -> Results:
    each = experiment.by_budget(1, 2)  # scales in a decade
    scales = [10 ** (i / each) for i in range(each * _SMALLEST, each * _LARGEST + 1)]
    networks = experiment.by_budget({WITH_BN: "bn_mlp", WITHOUT_BN: "mlp"}, experiment.network_pair())
    arms = {
        f"{arm}, {scale:.3g}": experiment.recipe(
            network,
            initialisation=f"gaussian:{scale:.3g}",
            activation="relu",
            batch_size=60,
            steps=experiment.by_budget(150, 3000),
            schedule="constant",
            weight_decay=0.0,
            validate_every=100_000,
        )
        for arm, network in networks.items()
        for scale in scales
    }
    results = experiment.run_learning_rates(arms, RATES)
    for row in results["accuracy"]:
        network, scale = str(row["arm"]).split(", ")
        row |= {"network": network, "scale": float(scale)}
    return results


def conclude(results: Results) -> Conclusion:
    all_ends = last_rows(results["accuracy"], "arm", "learning_rate", "seed")
    ends = where(all_ends, chosen=1)
    thresholds = {seed: _threshold(where(ends, seed=seed)) for seed in seeds(ends)}
    decades = {
        network: [_decades(where(ends, network=network, seed=seed), least) for seed, least in thresholds.items()]
        for network in _NETWORKS
    }
    scales = sorted(set(numbers(ends, "scale")))
    axis = "standard deviation of the first weights"
    lost = [seed for seed, threshold in thresholds.items() if math.isnan(threshold)]
    return Conclusion(
        evidence=(
            Evidence(
                "with BN more decades of the weights' first scale train",
                [a - b for a, b in zip(*decades.values(), strict=True)],
                above=0.0,
                unit="decades",
                resolution=math.log10(scales[1] / scales[0]),
            ),
        ),
        plots={
            "accuracy": accuracy_curves(
                ends, "Accuracy by the scale of the first weights", x="scale", label=axis, arm="network", log_x=True
            ),
            "learning-rate": Plot(
                title="The learning rate that suits it best",
                x=axis,
                y="learning rate",
                series=series_by_arm(ends, "scale", "learning_rate", arm="network"),
                caption=caption(ends, BAND),
                table="accuracy",
                log_x=True,
                log_y=True,
            ),
        },
        numbers={f"decades that train, {arm}, mean": sum(found) / len(found) for arm, found in decades.items()},
        remarks=(
            *_remarks(all_ends),
            *(f"seed {seed}: neither network learnt from any scale, so it shows nothing" for seed in lost),
        ),
    )


def _threshold(rows: Records) -> float:
    """The accuracy above which either network of a seed counts as trained; NaN where none learnt anything."""
    guess, best = number(rows[0], "guess"), max(numbers(rows, "test_top1"))
    return (guess + best) / 2 if best > learnt_threshold(rows[0]) else math.nan


def _decades(rows: Records, threshold: float) -> float:
    """The decades of scale at which a network's accuracy is above the threshold.

    Between two scales the accuracy is interpolated linearly over the logarithm of the scale.
    """
    if not rows or math.isnan(threshold):
        return math.nan
    points = sorted((math.log10(number(row, "scale")), number(row, "test_top1")) for row in rows)
    width = 0.0
    for (left, one), (right, other) in pairwise(points):
        low, high = sorted((one, other))
        if high > threshold:
            fraction = 1.0 if low >= threshold else (high - threshold) / (high - low)
            width += fraction * (right - left)
    return width


def _remarks(rows: Records) -> list[str]:
    sentences = []
    for network in _NETWORKS:
        here = where(rows, network=network)
        diverged = sum(row["diverged_at"] is not None for row in here)
        sentences.append(f"{network}: {plural(diverged, 'training')} of {len(here)} diverged")
        for rate, end in ((min(RATES), "lowest"), (max(RATES), "highest")):
            scales = sorted(set(numbers(where(here, chosen=1, learning_rate=rate), "scale")))
            if scales:
                at = ", ".join(f"{scale:g}" for scale in scales)
                sentences.append(f"{network}: the best learning rate was the {end} tried ({rate:g}) at scales of {at}")
    return sentences


STUDY = Study(
    name="initialisation",
    title="The scale of the first weights",
    claim="""With batch normalisation one can be "less careful about initialization": a network trains from first
    weights of more scales.""",
    source="Ioffe & Szegedy 2015, abstract and sec. 3.3",
    protocol="""The networks have three hidden layers of 100 rectified units (full: small Inception, or GoogLeNet on
    photos), with and without BN. Their first weights are from N(0, s^2), with s from 0.0001 to 10 in decades (full:
    half decades); those of the last layer are from N(0, 0.01^2), as in all of bnlab's networks. They are trained for
    150 steps (full: 3000) by gradient descent with momentum 0.9 on batches of 60, at a constant learning rate: the best
    of 0.000001 to 1 in decades by val accuracy, chosen for each network, scale and seed, because without BN a network
    with weights too large for the usual rates may train at a small one. A scale trains if the test accuracy is more
    than halfway from guessing to the best of the seed over all scales and both networks, so that one threshold holds
    for both. A seed whose best is no better than guessing shows nothing.""",
    rule="""There is one clause: the decades of scale that train with BN, less those that train without, are above 0.
    It is decided by the 95% interval over seeds, which is no narrower than one step of the grid to either side.""",
    measure=measure,
    conclude=conclude,
)
