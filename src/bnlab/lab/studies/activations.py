"""Paper 4.1 and Fig. 1: a sigmoid network with and without BN, its accuracy, and how its activations' inputs move."""

from typing import Any

import torch
from torch import Tensor

from bnlab.lab.experiment import WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import BAND, caption, series_by_arm
from bnlab.lab.records import Records, Results, by_seed, gained, last, mean, number, ratios, resolution, where
from bnlab.lab.replay import preserving_state, use_batch_statistics
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, train
from bnlab.lab.verdict import Evidence
from bnlab.nets.blocks import conv_norm_acts
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot, Series
from bnlab.training.build import TrainingContext
from bnlab.training.validate import calibration_batches

RATES = (0.1, 0.3, 1.0, 3.0)
PERCENTILES = (15, 50, 85)
_LOOKED_AT = 512  # photos


def measure(experiment: Experiment) -> Results:
    """Both networks at each rate; of the last hidden layer the percentiles of each unit's input on the way."""
    same: dict[str, Any] = {
        "batch_size": 60,
        "steps": experiment.by_budget(1000, 50_000),
        "initialisation": "gaussian:0.05",
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "size": 28,
        "resize": "squash",
        "crop_area": (1.0, 1.0),
        "crop_aspect": (1.0, 1.0),
        "flip": 0.0,
    }
    networks = {WITH_BN: "bn_mlp", WITHOUT_BN: "mlp"}
    arms = {arm: experiment.recipe(network, **same) for arm, network in networks.items()}
    return experiment.run_learning_rates(arms, RATES, watched, every=experiment.by_budget(25, 250))


def watched(job: JobContext, recipe: Recipe, every: int) -> Results:
    """One training, looked at `every` so many steps."""
    probe = Percentiles(every)
    trained = train(job, recipe, probe=probe)
    return {"accuracy": trained.results["accuracy"]} | probe.summary()


class Percentiles(Probe):
    """The percentiles, over the same photos each time, of what goes into each sigmoid of the last hidden layer.

    The network normalises these photos by their own statistics, as in training it does a batch.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.seen: list[tuple[int, Tensor]] = []  # step, 3 x units
        self.images = torch.empty(0)

    def begin(self, context: TrainingContext) -> None:
        """Choose the photos: of train as inference sees them, for held-out ones are not for looking at here."""
        loader = context.loader
        paths = [loader.paths[i] for i in loader.sample(_LOOKED_AT)]
        batches = calibration_batches(paths, context.preprocessing, batch_size=_LOOKED_AT, device=context.device)
        self.images = next(batches)  # N x 3 x H x W

    def before(self, step: int, context: TrainingContext) -> None:
        """Look, where it is time."""
        if step % self.every:
            return
        network = context.network
        found: list[Tensor] = []
        hook = conv_norm_acts(network)[-1].activation.register_forward_pre_hook(
            lambda _, inputs: found.append(inputs[0])
        )
        with preserving_state(network), torch.no_grad():
            network.eval()
            use_batch_statistics(network)
            network(self.images)
        hook.remove()
        shares = torch.tensor(PERCENTILES, device=found[0].device) / 100
        self.seen.append((step, found[0].float().quantile(shares, dim=0).cpu()))  # 3 x units

    def summary(self) -> Results:
        """What is worth a table: how far all units' percentiles went, and those of the unit that went the median way.

        A unit's movement is the range (highest less lowest over the training) of each percentile, averaged over the
        three, in units of its mean spread (85th less 15th). So a unit that merely grows to another scale moves too.
        """
        history = torch.stack([values for _, values in self.seen])  # T x 3 x units
        spread = (history[:, 2] - history[:, 0]).mean(0).clamp(min=1e-12)  # units
        movement = (history.amax(0) - history.amin(0)).mean(0) / spread  # units
        typical = int(movement.argsort()[len(movement) // 2])
        return {
            "percentiles": [
                {"step": step, "percentile": percentile, "value": float(values[i, typical])}
                for step, values in self.seen
                for i, percentile in enumerate(PERCENTILES)
            ],
            "movement": [{"movement": float(movement.median()), "units": len(movement)}],
        }

    def state_dict(self) -> dict[str, Any]:
        """With what was seen."""
        return super().state_dict() | {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Stand where it stood."""
        super().load_state_dict(state)
        self.seen = state["seen"]


def conclude(results: Results) -> Conclusion:
    """Accuracy on the way and at the end, and how far the percentiles moved."""
    accuracies, moves = chosen(results), chosen(results, "movement")
    points: dict[str, Any] = {"above": 0.0, "unit": "points", "resolution": resolution(accuracies)}
    return Conclusion(
        evidence=(
            Evidence(
                what="with BN the test accuracy is higher at the end",
                values=gained(accuracies, WITH_BN, WITHOUT_BN, last("test_top1")),
                **points,
            ),
            Evidence(
                what="with BN the test accuracy is higher on average over the training",
                values=gained(accuracies, WITH_BN, WITHOUT_BN, mean("test_top1")),
                **points,
            ),
            Evidence(
                what="with BN the inputs of the last sigmoids move less",
                values=ratios(moves, WITH_BN, WITHOUT_BN, last("movement")),
                below=1.0,
                unit="times",
                ratio=True,
            ),
        ),
        plots={"accuracy": _accuracy(accuracies)}
        | {
            f"percentiles {arm}": _percentiles(where(chosen(results, "percentiles"), arm=arm, seed=0), arm)
            for arm in (WITH_BN, WITHOUT_BN)
        },
        numbers={f"learning rate {arm}, mean": _mean_rate(where(accuracies, arm=arm)) for arm in (WITH_BN, WITHOUT_BN)},
        remarks=lr_remarks(results),
    )


def _mean_rate(rows: Records) -> float:
    rates = by_seed(rows, last("learning_rate"))
    return sum(rates) / len(rates)


def _accuracy(rows: Records) -> Plot:
    return Plot(
        title="Accuracy of 3 x 100 sigmoid units",
        x="steps of 60 digits",
        y="right on test, %",
        series=series_by_arm(rows, "step", "test_top1", times=100),
        caption=caption(rows, BAND),
        table="accuracy",
    )


def _percentiles(rows: Records, arm: str) -> Plot:
    def line(percentile: Any) -> Series:
        here = where(rows, percentile=percentile)
        x, y = (tuple(number(row, key) for row in here) for key in ("step", "value"))
        return Series(name=f"{percentile}th percentile", x=x, y=y, colour=0)

    return Plot(
        title=f"Input of a sigmoid of the last hidden layer, {arm}",
        x="steps of 60 digits",
        y="input of the sigmoid",
        series=tuple(map(line, reversed(PERCENTILES))),  # as they lie, from the top
        caption=f"over {_LOOKED_AT} digits; the unit whose movement is the median of its layer's, seed 0",
        table="percentiles",
    )


STUDY = Study(
    name="activations",
    title="Activations over a training",
    claim="""With batch normalisation a sigmoid network trains faster and to a higher accuracy, and the distributions of
    its activations' inputs are more stable.""",
    source="Ioffe & Szegedy 2015, sec. 4.1 and Fig. 1",
    protocol="""The paper's network: three hidden layers of 100 sigmoid units, on digits of 28 x 28, batches of 60,
    weights from N(0, 0.05^2) (the paper says small and Gaussian, no more), the same initial weights in both. The paper
    gives neither optimiser nor learning rate: plain gradient descent at a constant rate, the best of 0.1, 0.3, 1 and 3
    by val accuracy, chosen for each network and seed. Percentiles are of 512 training digits, normalised by their own
    statistics. Movement: the range of a unit's {15, 50, 85}th percentiles over the training in units of its mean
    spread; the median over the layer's units.""",
    rule="""Three clauses: a higher accuracy on test at the end (difference above 0), on average over the training
    (above 0), and less movement (ratio below 1). Each by its 95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
)
