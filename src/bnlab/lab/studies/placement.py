"""Paper, sec. 3.2: normalisation before the nonlinearity against normalisation after it, network by network."""

from collections.abc import Sequence

from bnlab.lab.clauses import points_clause
from bnlab.lab.experiment import Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.plots import BARS, caption, category_plot, interval_series
from bnlab.lab.records import Results, average, distinct, gained, last, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

RATES = (0.01, 0.03, 0.1, 0.3)
BEFORE, AFTER = "before", "after"
_SMALL_PHOTOS = 64  # pixels: the stems of the large networks would leave next to nothing of such photos
_NOTE = ": normalised "  # between a network and its placement, in the name of an arm
_QUICK = {
    "MLP, sigmoid": ("bn_mlp", "sigmoid"),
    "MLP, ReLU": ("bn_mlp", "relu"),
    "small Inception": ("bn_small_inception", "relu"),
}
_FULL = {"GoogLeNet": ("bn_googlenet", "relu"), "BN-Inception": ("bn_inception", "relu")}


def measure(experiment: Experiment) -> Results:
    arms = {
        arm(label, placement): _recipe(experiment, *network).model_copy(update={"placement": placement})
        for label, network in experiment.by_budget(_QUICK, _QUICK | _FULL).items()
        for placement in (BEFORE, AFTER)
    }
    return experiment.run_learning_rates(arms, RATES)


def _recipe(experiment: Experiment, network: str, activation: str) -> Recipe:
    steps = experiment.by_budget(200, 6000)
    recipe = experiment.recipe(network, activation=activation, steps=steps, validate_every=1_000_000)
    small = (network, activation) in _FULL.values() and recipe.stem is None and recipe.size <= _SMALL_PHOTOS
    return recipe.model_copy(update={"stem": "small"}) if small else recipe


def arm(network: str, placement: str) -> str:
    return f"{network}{_NOTE}{placement}"


def conclude(results: Results) -> Conclusion:
    rows = chosen(results)
    rows = [row | dict(zip(("network", "placement"), str(row["arm"]).split(_NOTE), strict=True)) for row in rows]
    networks = [str(name) for name in distinct(rows, "network")]
    evidence = tuple(
        points_clause(
            f"{name}: normalised before the nonlinearity its test accuracy is higher",
            gained(rows, arm(name, BEFORE), arm(name, AFTER), last("test_top1")),
            rows,
            above=0.0,
        )
        for name in networks
    )

    def differences(evidence: Sequence[Evidence]) -> dict[str, Plot]:
        plot = Plot(
            title="What normalising before the nonlinearity gains",
            x="network",
            y="before less after, percentage points on test",
            series=(interval_series("before less after", evidence),),
            categories=networks,
            lines=((0.0, "no difference"),),
            caption=caption(rows, "point: mean over seeds, bar: its 95% interval"),
            table="accuracy",
        )
        return {"differences": plot}

    groups = {f"{placement} the nonlinearity": where(rows, placement=placement) for placement in (BEFORE, AFTER)}
    about = {"title": "Test accuracy by placement", "x": "network", "table": "accuracy", "caption": caption(rows, BARS)}
    return Conclusion(
        evidence=evidence,
        plots={"accuracy": category_plot(groups, "network", "test_top1", networks, times=100, **about)},
        intervals=differences,
        numbers={
            f"learning rate, {name}, mean": average(where(rows, arm=name), "learning_rate")
            for name in distinct(rows, "arm")
        },
        remarks=lr_remarks(results),
    )


STUDY = Study(
    name="placement",
    title="Normalisation before or after the nonlinearity",
    claim="""The input of the nonlinearity is the place to normalise: it gives a higher test accuracy than normalising
    its output.""",
    source="""Ioffe & Szegedy 2015, sec. 3.2, which argues for it by how the inputs are distributed, and compares the
    two in no experiment; compared, with different outcomes by network, in ducha-aiki/caffenet-benchmark (CaffeNet
    better after, GoogLeNet better before; single runs)""",
    protocol="""Three networks are trained: three hidden layers of 100 sigmoid units, the same of ReLU, and a small
    Inception of ReLU (full: GoogLeNet and BN-Inception as well). Each is trained with its normalisation before every
    nonlinearity and after it, from the same initial weights and on the same batches. Layers that are normalised after
    the nonlinearity keep their biases, which normalisation before it makes redundant. Trainings take 200 steps of 32
    photos (full: 6,000), by SGD with momentum and one cycle of the learning rate. Its highest value is chosen by val
    accuracy for each network, placement and seed, of 0.01, 0.03, 0.1 and 0.3.""",
    rule="""There is one clause for each network: the test accuracy with normalisation before the nonlinearity, less
    that with normalisation after it, is above 0, by its 95% interval over seeds. The claim makes no exceptions: it
    holds if the clause does for every network, and does not hold if the clause does not for one.""",
    measure=measure,
    conclude=conclude,
)
