"""Paper, sec. 3.2: normalisation before the nonlinearity, or after it, network by network."""

from collections.abc import Sequence
from dataclasses import dataclass

from bnlab.lab.experiment import Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.plots import BARS, caption, category_series, interval_series
from bnlab.lab.records import Records, Results, Row, distinct, gained, last, number, resolution, where
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.verdict import Evidence
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot

RATES = (0.01, 0.03, 0.1, 0.3)
BEFORE, AFTER = "before", "after"
SIGMOID, RELU, SMALL = "MLP, sigmoid", "MLP, ReLU", "small Inception"
GOOGLENET, INCEPTION = "GoogLeNet", "BN-Inception"
_SMALL_PHOTOS = 64  # px, which the large networks' own stems would leave next to nothing of
_NOTE = ": normalised "  # between a network and its placement, in the name of an arm


@dataclass(frozen=True)
class _Network:
    name: str
    activation: str


_QUICK = {
    SIGMOID: _Network("bn_mlp", "sigmoid"),
    RELU: _Network("bn_mlp", "relu"),
    SMALL: _Network("bn_small_inception", "relu"),
}
_FULL = {GOOGLENET: _Network("bn_googlenet", "relu"), INCEPTION: _Network("bn_inception", "relu")}


def measure(experiment: Experiment) -> Results:
    """Every network with either placement, at each rate."""
    networks = experiment.by_budget(_QUICK, _QUICK | _FULL)
    arms = {
        arm(label, placement): _recipe(experiment, network).model_copy(update={"placement": placement})
        for label, network in networks.items()
        for placement in (BEFORE, AFTER)
    }
    return experiment.run_learning_rates(arms, RATES)


def _recipe(experiment: Experiment, network: _Network) -> Recipe:
    recipe = experiment.recipe(
        network.name, activation=network.activation, steps=experiment.by_budget(200, 6000), validate_every=1_000_000
    )
    small = network in _FULL.values() and recipe.stem is None and recipe.size <= _SMALL_PHOTOS
    return recipe.model_copy(update={"stem": "small"}) if small else recipe


def arm(network: str, placement: str) -> str:
    """The name of a network with that placement."""
    return f"{network}{_NOTE}{placement}"


def conclude(results: Results) -> Conclusion:
    """Before against after, for each network."""
    rows = [row | _parts(row) for row in chosen(results)]
    networks = [str(name) for name in distinct(rows, "network")]
    evidence = tuple(
        Evidence(
            what=f"{name}: normalised before the nonlinearity its test accuracy is higher",
            values=gained(rows, arm(name, BEFORE), arm(name, AFTER), last("test_top1")),
            above=0.0,
            unit="points",
            resolution=resolution(rows),
            level=1 - 0.05 / len(networks),
        )
        for name in networks
    )
    return Conclusion(
        evidence=evidence,
        plots={"accuracy": _accuracy(rows, networks)},
        intervals=lambda evidence: {"differences": _differences(evidence, rows, networks)},
        numbers={f"learning rate, {name}, mean": _rate(where(rows, arm=name)) for name in distinct(rows, "arm")},
        remarks=lr_remarks(results),
    )


def _parts(row: Row) -> Row:
    network, placement = str(row["arm"]).split(_NOTE)
    return {"network": network, "placement": placement}


def _rate(rows: Records) -> float:
    return sum(number(row, "learning_rate") for row in rows) / len(rows)


def _accuracy(rows: Records, networks: list[str]) -> Plot:
    return Plot(
        title="Test accuracy by placement",
        x="network",
        y="right on test, %",
        series=tuple(
            category_series(
                f"{placement} the nonlinearity",
                where(rows, placement=placement),
                "network",
                "test_top1",
                networks,
                times=100,
            )
            for placement in (BEFORE, AFTER)
        ),
        categories=networks,
        caption=caption(rows, BARS),
        table="accuracy",
    )


def _differences(evidence: Sequence[Evidence], rows: Records, networks: list[str]) -> Plot:
    return Plot(
        title="What normalising before the nonlinearity gains",
        x="network",
        y="before less after, percentage points on test",
        series=(interval_series("before less after", evidence),),
        categories=networks,
        lines=((0.0, "no difference"),),
        caption=caption(rows, f"point: mean over seeds, bar: its {100 * evidence[0].level:.1f}% interval"),
        table="accuracy",
    )


STUDY = Study(
    name="placement",
    title="Normalisation before or after the nonlinearity",
    claim="""The input of the nonlinearity is the place to normalise: it gives a higher test accuracy than normalising
    its output.""",
    source="""Ioffe & Szegedy 2015, sec. 3.2, which argues for it by how the inputs are distributed, and compares the
    two in no experiment; compared, with different outcomes by network, in ducha-aiki/caffenet-benchmark (CaffeNet
    better after, GoogLeNet better before; single runs)""",
    protocol="""Three hidden layers of 100 sigmoid units, the same of ReLU, and a small Inception of ReLU (full:
    GoogLeNet and BN-Inception too), each trained with its normalisation before and after every nonlinearity, from the
    same initial weights on the same batches. After it, layers keep their biases, which normalisation before it makes
    redundant. 200 steps of 32 photos, full 6,000; SGD with momentum, one cycle of the learning rate, whose highest
    value is chosen by val for each network, placement and seed, of 0.01, 0.03, 0.1 and 0.3.""",
    rule="""One clause a network: the test accuracy before less that after is above 0. Its interval over seeds is
    widened for the number of networks (Bonferroni: 95% for all together). The claim, which makes no exceptions, holds
    if it does for every network, and does not hold if it does not for one.""",
    measure=measure,
    conclude=conclude,
)
