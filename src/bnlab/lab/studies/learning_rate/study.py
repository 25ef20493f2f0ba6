"""Paper 4.2, Figs. 2 and 3: Inception and its four successors with BN, and how many steps each takes."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

from bnlab.errors import plural
from bnlab.lab.clauses import points_clause, ratio_clause
from bnlab.lab.experiment import Experiment
from bnlab.lab.lr_selection import divergence_remarks, lr_remarks
from bnlab.lab.plots import BAND, BARS, accuracy_curves, caption, category_plot, series_by_arm
from bnlab.lab.records import Records, Results, Value, distinct, joined, last_rows, number, ratios, seeds, where
from bnlab.lab.studies.learning_rate.max_stable_lr import BLOWN_UP, PROBES, max_stable_lr
from bnlab.lab.studies.learning_rate.steps_to_accuracy import StepsToAccuracy, best_test_top1
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import measure_accuracy
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

BASELINE = "Inception"
# The paper's name of each network, its recipe, and its learning rate as a multiple of Inception's.
SUCCESSORS: Mapping[str, tuple[str, float]] = {
    "BN-Baseline": ("bn-baseline", 1),
    "BN-x5": ("bn-x5", 5),
    "BN-x30": ("bn-x30", 30),
    "BN-x5-Sigmoid": ("bn-x5-sigmoid", 5),
}
# Were both tuned alike? To see it, they are trained at these rates too.
ALSO: Mapping[str, tuple[str, float]] = {
    "Inception x5": ("inception", 5),
    "BN-Baseline x5": ("bn-baseline", 5),
    "BN-Baseline x30": ("bn-baseline", 30),
    "BN-x1": ("bn-x5", 1),
}
_FAMILIES = {
    "inception": "Inception",
    "bn-baseline": "BN alone",
    "bn-x5": "BN and the seven changes",
    "bn-x30": "BN and the seven changes",
    "bn-x5-sigmoid": "the same with sigmoids",
}
PROBED = {BASELINE: "inception", "BN-Baseline": "bn-baseline", "BN-x5": "bn-x5", "BN-x5-Sigmoid": "bn-x5-sigmoid"}
CLAIMED_SPEED = 14.0


def measure(experiment: Experiment) -> Results:
    """Trains Inception at several rates, and the others at multiples of its best one; searches the highest rates."""
    rates = experiment.by_budget((0.003, 0.01, 0.03), (0.0015, 0.005, 0.015, 0.05))
    found = experiment.run_learning_rates({BASELINE: _recipe(experiment, "inception")}, rates)
    for row in found["accuracy"]:
        row["family"] = _FAMILIES["inception"]
    suited = _suited(found["accuracy"])
    also = experiment.by_budget(("Inception x5", "BN-Baseline x5"), tuple(ALSO))
    steps = experiment.by_budget(30, 200)
    short = {"steps": steps, "schedule": "constant", "validate_every": 10**6}
    measurements = []
    for arm, (name, factor) in {**SUCCESSORS, **{arm: ALSO[arm] for arm in also}}.items():
        for seed in experiment.seeds:
            rate = {"learning_rate": factor * suited[seed]}
            labels: dict[str, Value] = {"arm": arm, "family": _FAMILIES[name], **rate, "chosen": int(arm in SUCCESSORS)}
            recipe = _recipe(experiment, name).model_copy(update=rate)
            measurements.append(experiment.measurement(measure_accuracy, seed, labels=labels, recipe=recipe))
    for arm in experiment.by_budget((BASELINE, "BN-x5"), tuple(PROBED)):
        for seed in experiment.seeds:
            recipe = _recipe(experiment, PROBED[arm]).model_copy(update={"learning_rate": suited[seed], **short})
            search = partial(experiment.measurement, max_stable_lr, recipe=recipe, steps=PROBES * steps)
            measurements.append(search(seed, labels={"arm": arm}))
    return joined([({}, found), ({}, experiment.run(measurements))])


def _suited(accuracies: Records) -> dict[int, float]:
    """The best learning rate of Inception for each seed."""
    chosen = where(accuracies, arm=BASELINE, chosen=1)
    return {int(number(row, "seed")): number(row, "learning_rate") for row in chosen}


def _recipe(experiment: Experiment, name: str) -> Recipe:
    options = experiment.by_budget({"validate_every": 2, "steps": 200}, {"validate_every": 1})
    return experiment.paper_recipe(name, **options)


def conclude(results: Results) -> Conclusion:
    accuracies = where(results["accuracy"], chosen=1)
    steps = StepsToAccuracy(accuracies, BASELINE)
    points = partial(points_clause, tested=accuracies, above=0.0)

    def better(arm: str) -> list[float]:
        pairs = zip(steps.best[arm], steps.best[BASELINE], steps.reached[BASELINE], strict=True)
        return [math.nan if math.isnan(reached.at) else 100 * (a - b) for a, b, reached in pairs]

    reach = "reaches the best accuracy of Inception"
    bn5, bn30 = "BN-x5", "BN-x30"
    claimed = steps.speedup(bn5, CLAIMED_SPEED)
    bears = ratios(results["highest"], bn5, BASELINE, _rate)  # each rate is found to a factor of 2
    others = [row for row in results["accuracy"] if row["arm"] != BASELINE]
    return Conclusion(
        evidence=(
            ratio_clause(f"{bn5} {reach} in fewer steps", steps.speedup(bn5), above=1.0),
            ratio_clause(f"{bn5} {reach} in 14 times fewer", claimed, above=CLAIMED_SPEED),
            points(f"{bn30} reaches a higher accuracy than Inception", better(bn30)),
            ratio_clause(f"{bn5}'s network bears a higher learning rate", bears, above=1.0, resolution=math.log(2)),
            ratio_clause(f"BN-Baseline {reach} in fewer steps", steps.speedup("BN-Baseline"), above=1.0, primary=False),
            ratio_clause(f"{bn30} {reach} in fewer steps", steps.speedup(bn30), above=1.0, primary=False),
            points(f"{bn5} reaches a higher accuracy than Inception", better(bn5), primary=False),
        ),
        plots=_plots(results),
        numbers={f"best accuracy of {arm}, %": 100 * sum(of) / len(of) for arm, of in steps.best.items()}
        | {f"steps of {arm} to the best accuracy of {BASELINE}": steps.mean_steps(arm) for arm in steps.best},
        remarks=(
            *steps.remarks,
            *_remarks(claimed, results["highest"]),
            *lr_remarks({"accuracy": where(results["accuracy"], arm=BASELINE)}),
            *divergence_remarks(others, "counts by its best before"),
        ),
    )


def _rate(rows: Records) -> float:
    """The highest stable rate; NaN if no rate was stable."""
    return math.nan if rows[0]["rate"] is None else number(rows[0], "rate")


def _remarks(claimed: Sequence[float], highest: Records) -> list[str]:
    sentences = []
    if unknown := sum(map(math.isnan, claimed)):
        sentences.append(
            f"whether BN-x5 takes {CLAIMED_SPEED:g} times fewer steps is not known in {unknown} of {len(claimed)} "
            "seeds: the validations are too far apart, or Inception did not learn"
        )
    for arm in distinct(highest, "arm"):
        rows = where(highest, arm=arm)
        ends = {"no rate was stable": where(rows, rate=None), "the highest tried was stable": where(rows, at_least=1)}
        sentences += [
            f"highest stable rate of {arm}: {end} in {len(found)} of {len(rows)} seeds"
            for end, found in ends.items()
            if found
        ]
    return sentences


def _plots(results: Results) -> dict[str, Plot]:
    everything = results["accuracy"]
    suited = _suited(everything)
    highest = [row for row in results["highest"] if row["rate"] is not None]
    best: Records = []
    for row in last_rows(everything, "arm", "learning_rate", "seed"):
        training = where(everything, arm=row["arm"], seed=row["seed"], learning_rate=row["learning_rate"])
        factor = number(row, "learning_rate") / suited[int(number(row, "seed"))]
        best.append({**row, "factor": factor, "test_top1": best_test_top1(training)})
    return {
        "accuracy": accuracy_curves(where(everything, chosen=1), "Accuracy on the way", label="steps of 32 photos"),
        "search": Plot(
            title="The search: best accuracy by learning rate",
            x="learning rate, in times that which suits Inception (logarithmic)",
            y="best accuracy on test, %",
            series=series_by_arm(best, "factor", "test_top1", arm="family", times=100),
            caption=caption(everything, "best accuracy of a training; " + BAND),
            table="accuracy",
            log_x=True,
        ),
        "highest rate": category_plot(
            {"highest rate": highest},
            "arm",
            "rate",
            distinct(results["highest"], "arm"),
            title="Highest stable learning rate",
            x="",
            y="learning rate (logarithmic)",
            caption=f"{plural(len(seeds(everything)), 'seed')}; found to a factor of 2; {BARS}",
            table="highest",
            log_y=True,
        ),
    }


STUDY = Study(
    name="learning-rate",
    title="Higher learning rates",
    claim="""Batch normalisation, with the changes it permits, reaches the best accuracy of Inception in 14 times fewer
    steps (BN-x5), passes it (BN-x30), and bears much higher learning rates.""",
    source="Ioffe & Szegedy 2015, sec. 4.2, Figs. 2 and 3",
    protocol=f"""The paper's five networks are trained by bnlab's recipes (inception, bn-baseline, bn-x5, bn-x30,
    bn-x5-sigmoid). The paper gives Inception the rate that suits it. Here Inception is trained at several rates, and
    the best by val accuracy is its rate, for each seed; BN-Baseline has the same, and the others 5 and 30 times as
    much. To see whether both were tuned alike, Inception and BN-Baseline are also trained at multiples of the rate, and
    in full also the seven changes at the rate itself. Without BN the first weights are scaled on a batch so that each
    layer begins with outputs of mean square 1, because it does not train reliably otherwise; the paper says nothing of
    this. Accuracy is validated after every epoch (quick: every second) by recalibrated statistics. The best accuracy is
    that on test at the validation which was best on val. Between validations, and from guessing at step 0 to the first
    one, the accuracy on test is interpolated linearly. Quick: a small Inception at 32 px, 200 steps. The highest stable
    rate is found by bisection, to a factor of 2. A rate is stable if after 30 steps (full: 200) every loss was finite,
    the loss on val is below {BLOWN_UP} times that of guessing, and the outputs still depend on the photo.""",
    rule="""There are four primary clauses: the steps of Inception to its best accuracy over the steps of BN-x5 to the
    same (above 1, and above 14), the best accuracy of BN-x30 less that of Inception (above 0 points), and the highest
    stable rate of BN-x5's network over that of Inception's (above 1). Each is decided by its 95% interval over seeds. A
    network that never reaches the accuracy counts as if it reached it with its last step. A seed shows nothing, so that
    the clause has no verdict, if the best accuracy of Inception is no better than guessing; and, for 14 times, if the
    factors that the validations allow include 14. With 14 epochs or fewer, as in a quick study, that clause can be
    refuted but not shown.""",
    measure=measure,
    conclude=conclude,
)
