"""Paper 4.1 and Fig. 1: a sigmoid network with and without BN, its accuracy, and how its activations' inputs move."""

from functools import partial

import torch
from torch import Tensor

from bnlab.lab.clauses import points_clause, ratio_clause
from bnlab.lab.experiment import PLAIN_DESCENT, WITH_BN, WITHOUT_BN, Experiment
from bnlab.lab.lr_selection import chosen, lr_remarks
from bnlab.lab.measurements import JobContext
from bnlab.lab.plots import accuracy_curves
from bnlab.lab.records import Records, Results, by_seed, gained, last, mean, numbers, ratios, where
from bnlab.lab.replay import preserving_state, use_batch_statistics
from bnlab.lab.study import Conclusion, Study
from bnlab.lab.trained_network import Probe, sample_of_train, train
from bnlab.nets.blocks import conv_norm_acts
from bnlab.recipe import Recipe
from bnlab.report.plots import Plot, Series
from bnlab.training.build import TrainingContext

RATES = (0.1, 0.3, 1.0, 3.0)
PERCENTILES = (15, 50, 85)
_IMAGES = 512  # training photos whose activations are recorded


def measure(experiment: Experiment) -> Results:
    """Trains both networks at each rate, and records percentiles of what the last hidden layer's sigmoids receive."""
    same = {**PLAIN_DESCENT, "batch_size": 60, "initialisation": "gaussian:0.05"}
    same |= {"size": 28, "resize": "squash", "crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "flip": 0.0}
    same["steps"] = experiment.by_budget(1000, 50_000)
    arms = {WITH_BN: experiment.recipe("bn_mlp", **same), WITHOUT_BN: experiment.recipe("mlp", **same)}
    return experiment.run_learning_rates(arms, RATES, train_recording, every=experiment.by_budget(25, 250))


def train_recording(job: JobContext, recipe: Recipe, every: int) -> Results:
    probe = Percentiles(every)
    return {"accuracy": train(job, recipe, probe=probe).results["accuracy"]} | probe.summary()


class Percentiles(Probe):
    """Records the percentiles over photos of the input of each sigmoid of the last hidden layer.

    The photos are the same each time. The network normalises them by their own statistics, as it does a batch in
    training.
    """

    saved = ("seen",)

    def __init__(self, every: int) -> None:
        super().__init__(every)
        self.seen: list[tuple[int, Tensor]] = []  # step, 3 x units

    def begin(self, context: TrainingContext) -> None:
        self.images, _ = sample_of_train(context, _IMAGES)  # N x 3 x H x W

    def before(self, step: int, context: TrainingContext) -> None:
        if step % self.every:
            return
        network = context.network
        found: list[Tensor] = []
        sigmoids = conv_norm_acts(network)[-1].activation
        hook = sigmoids.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        with hook, preserving_state(network), torch.no_grad():
            network.eval()
            use_batch_statistics(network)
            network(self.images)
        fractions = torch.tensor(PERCENTILES, device=found[0].device) / 100
        self.seen.append((step, found[0].float().quantile(fractions, dim=0).cpu()))  # 3 x units

    def summary(self) -> Results:
        """Two tables: the median movement of the layer's units, and the percentiles of the unit that moved that much.

        A unit's movement is the range of each percentile over the training (highest less lowest), averaged over the
        three percentiles, in units of the unit's mean spread (85th less 15th percentile). A unit whose inputs only
        grow in scale moves too.
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


def conclude(results: Results) -> Conclusion:
    accuracies = chosen(results)
    at_end, on_average = (gained(accuracies, WITH_BN, WITHOUT_BN, pick("test_top1")) for pick in (last, mean))
    moved = ratios(chosen(results, "movement"), WITH_BN, WITHOUT_BN, last("movement"))
    points = partial(points_clause, tested=accuracies, above=0.0)
    rates = {arm: by_seed(accuracies, last("learning_rate"), arm=arm) for arm in (WITH_BN, WITHOUT_BN)}
    percentiles = where(chosen(results, "percentiles"), seed=0)
    return Conclusion(
        evidence=(
            points("with BN the test accuracy is higher at the end", at_end),
            points("with BN the test accuracy is higher on average over the training", on_average),
            ratio_clause("with BN the inputs of the last sigmoids move less", moved, below=1.0),
        ),
        plots={
            "accuracy": accuracy_curves(accuracies, "Accuracy of 3 x 100 sigmoid units", label="steps of 60 digits"),
            **{f"percentiles {arm}": _percentiles(where(percentiles, arm=arm), arm) for arm in (WITH_BN, WITHOUT_BN)},
        },
        numbers={f"learning rate {arm}, mean": sum(best) / len(best) for arm, best in rates.items()},
        remarks=lr_remarks(results),
    )


def _percentiles(rows: Records, arm: str) -> Plot:
    lines = {f"{at}th percentile": where(rows, percentile=at) for at in reversed(PERCENTILES)}
    return Plot(
        title=f"Input of a sigmoid of the last hidden layer, {arm}",
        x="steps of 60 digits",
        y="input of the sigmoid",
        series=tuple(
            Series(name=name, x=tuple(numbers(line, "step")), y=tuple(numbers(line, "value")), colour=0)
            for name, line in lines.items()
        ),
        caption=f"over {_IMAGES} digits; the unit whose movement is the median of its layer's, seed 0",
        table="percentiles",
    )


STUDY = Study(
    name="activations",
    title="Activations over a training",
    claim="""With batch normalisation a sigmoid network trains faster and to a higher accuracy, and the distributions of
    its activations' inputs are more stable.""",
    source="Ioffe & Szegedy 2015, sec. 4.1 and Fig. 1",
    protocol="""The network is the paper's: three hidden layers of 100 sigmoid units, on digits of 28 x 28 pixels, in
    batches of 60. Both networks begin with the same weights from N(0, 0.05^2); the paper says only that they are small
    and Gaussian. The paper gives neither optimiser nor learning rate. Here it is plain gradient descent at a constant
    rate: the best of 0.1, 0.3, 1 and 3 by val accuracy, chosen for each network and seed. The percentiles are those of
    512 training digits, normalised by their own statistics. The movement of a unit is the range of its {15, 50, 85}th
    percentiles over the training, in units of its mean spread; the study takes the median over the layer's units.""",
    rule="""There are three clauses. With BN the test accuracy is higher at the end (the difference is above 0), it is
    higher on average over the training (above 0), and the inputs move less (the ratio is below 1). Each is decided by
    its 95% interval over seeds.""",
    measure=measure,
    conclude=conclude,
)
