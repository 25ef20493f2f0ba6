"""Paper 4.2.1: the seven changes that batch normalisation permits, each alone added and each alone left out."""

from collections.abc import Mapping, Sequence
from typing import Any

from bnlab.config import load_settings
from bnlab.lab.experiment import Experiment
from bnlab.lab.lr_selection import divergence_remarks
from bnlab.lab.plots import caption, interval_series
from bnlab.lab.records import Results, average, distinct, gained, last, resolution, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.nets.registry import has_row
from bnlab.nets.tables import LocalResponse
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

NONE, SEVEN = "none of them", "all of them"
# The change, by the recipe's key that makes it.
CHANGES: Mapping[str, str] = {
    "learning_rate": "5 times the learning rate",
    "dropout": "no dropout",
    "weight_decay": "a fifth of the weight decay",
    "decay_epochs": "decay 6 times as fast",
    "local_response": "no local response normalisation",
    "shuffle": "thorough shuffling",
    "color_jitter": "less photometric distortion",
}


def measure(experiment: Experiment) -> Results:
    """BN-Baseline, BN-x5, and what lies one change from either, at equal steps."""
    before, after = (_recipe(experiment, name) for name in ("bn-baseline", "bn-x5"))
    differing = [key for key in CHANGES if getattr(before, key) != getattr(after, key)]
    arms = {NONE: before, SEVEN: after}
    for key in differing:
        arms[f"only {CHANGES[key]}"] = before.model_copy(update={key: getattr(after, key)})
        arms[f"all but {CHANGES[key]}"] = after.model_copy(update={key: getattr(before, key)})
    return experiment.run(experiment.measurements(arms))


def _recipe(experiment: Experiment, name: str) -> Recipe:
    small = experiment.budget == "quick" or experiment.splits.kind == "digits"
    network = "bn_small_inception" if small else "bn_inception"
    options: dict[str, Any] = {"validate_every": 10**6}
    if not has_row(network, LocalResponse):
        options["local_response"] = False
    if experiment.budget == "quick":  # 0.01 suited the small Inception without BN best, of 0.003, 0.01 and 0.03
        own = load_settings(name).recipe.learning_rate / load_settings("bn-baseline").recipe.learning_rate
        options |= {"steps": 150, "learning_rate": 0.01 * own}
    return experiment.recipe(network, base=name, **options)


def conclude(results: Results) -> Conclusion:
    """All together decide; of each alone an interval that allows for how many there are."""
    rows = results["accuracy"]
    arms = [str(arm) for arm in distinct(rows, "arm")]
    changes = [change for change in CHANGES.values() if f"only {change}" in arms]
    points: dict[str, Any] = {"above": 0.0, "unit": "points", "resolution": resolution(rows)}
    level = 1 - 0.05 / (2 * len(changes))

    def each(change: str, kind: str) -> Evidence:
        pair = (f"only {change}", NONE) if kind == "added" else (SEVEN, f"all but {change}")
        return Evidence(
            what=f"{change}, {kind}, raises the accuracy"
            if kind == "added"
            else f"leaving out {change} costs accuracy",
            values=gained(rows, *pair, last("test_top1")),
            level=level,
            primary=False,
            **points,
        )

    added, left = ([each(change, kind) for change in changes] for kind in ("added", "left out"))
    together = Evidence(
        what="the changes together raise the accuracy at equal steps",
        values=gained(rows, SEVEN, NONE, last("test_top1")),
        **points,
    )

    def changes_of(evidence: Sequence[Evidence]) -> dict[str, Plot]:
        alone = evidence[1:]
        text = f"point: mean over seeds, bar: {100 * level:.1f}% interval, so that all hold together in 95%"
        plot = Plot(
            title="What each change is worth",
            x="",
            y="points of test accuracy",
            series=(
                interval_series("added to none", alone[: len(changes)]),
                interval_series("left out of all", alone[len(changes) :]),
            ),
            caption=caption(rows, text),
            table="accuracy",
            categories=changes,
            lines=((0.0, "no change"),),
        )
        return {"changes": plot}

    return Conclusion(
        evidence=(together, *added, *left),
        plots={},
        intervals=changes_of,
        numbers={f"accuracy with {arm}, %": 100 * average(where(rows, arm=arm), "test_top1") for arm in (NONE, SEVEN)},
        remarks=divergence_remarks(rows),
    )


STUDY = Study(
    name="seven-changes",
    title="The seven changes",
    claim="""Adding batch normalisation alone does not take full advantage of it; the seven changes it permits do: a
    higher learning rate, no dropout, less weight decay, faster decay of the learning rate, no local response
    normalisation, more thorough shuffling, less photometric distortion.""",
    source="Ioffe & Szegedy 2015, sec. 4.2.1",
    protocol="""BN-Baseline and BN-x5 differ in the seven changes. Each change is added to BN-Baseline alone, and left
    out of BN-x5 alone; all trainings have equal steps, and the accuracy on test at their end is compared. Quick: small
    Inception at 32 px, 150 steps, from a learning rate of 0.01; it has no place for local response normalisation, so
    six changes remain. Full: BN-Inception by the paper's recipes.""",
    rule="""One clause decides: the accuracy with all changes less that with none is above 0, by its 95% interval over
    seeds. Of each change alone the interval is widened (Bonferroni) for twice as many comparisons as there are
    changes; they stand beside, for the paper claims the changes together.""",
    measure=measure,
    conclude=conclude,
)
