"""The example of sec. 2 of the paper: a bias before a mean whose dependence on it the gradient may ignore."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results
from bnlab.lab.replay import preserving_state
from bnlab.lab.trained_network import Probe, sample_of_train, train
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.build import build
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext

WITHIN, OUTSIDE, SCALED = "mean within the step", "mean outside", "mean and variance outside"
ARMS = (WITHIN, OUTSIDE, SCALED)
ALONE, ALL = "the biases alone", "everything"
_IMAGES = 512  # training photos on which the loss is measured


class DetachedMean(nn.Module):
    """The paper's example: x = u + b for a bias b, and of it x - E[x], with E[x] over the batch and all positions.

    The arm says what the gradient sees: the dependence of E[x] on b and u ("mean within the step"), or a constant
    ("mean outside"). "mean and variance outside" also divides by the standard deviation (biased, with an eps of 1e-5),
    which the gradient takes for a constant too. Training and evaluation are alike. N x C x ... in and out.
    """

    def __init__(self, channels: int, arm: str) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.arm = arm

    def forward(self, u: Tensor) -> Tensor:
        x = u + self.bias.view(-1, *[1] * (u.ndim - 2))  # N x C x ...
        others = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(others, keepdim=True)  # 1 x C x ...
        x = x - (mean if self.arm == WITHIN else mean.detach())  # N x C x ...
        if self.arm == SCALED:
            x = x / (x.detach().square().mean(others, keepdim=True) + 1e-5).sqrt()  # N x C x ...
        return x


def train_detached(job: JobContext, recipe: Recipe, norm: str, *, alone: bool, every: int) -> Results:
    """One training of a network with these layers, in which the biases alone are trained, or everything."""
    trained = train(job, recipe, probe=Growth(every), make=partial(make_network, arm=norm, alone=alone))
    return {"growth": trained.results["growth"], "trained": trained.results["accuracy"]}


def make_network(recipe: Recipe, classes: int, arm: str, *, alone: bool) -> TableNetwork:
    """A network with these layers in place of BN. With `alone`, only their biases are trained."""
    norm = partial(DetachedMean, arm=arm)
    network = build(recipe.network, classes=classes, norm=norm, width=recipe.width, seed=recipe.seed)
    for unit in conv_norm_acts(network):
        unit.layer.requires_grad_(not alone)
    network.fc.requires_grad_(not alone)
    return network


class Growth(Probe):
    """Records the norm of all biases of `DetachedMean` layers, and the loss on the same photos each time."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.images = self.labels = torch.empty(0)

    def begin(self, context: TrainingContext) -> None:
        self.images, self.labels = sample_of_train(context, _IMAGES)

    def before(self, step: int, context: TrainingContext) -> None:
        if step == 0:
            self._record(0, context)

    def after(self, step: int, context: TrainingContext) -> None:
        if (step + 1) % self.every == 0:
            self._record(step + 1, context)

    def _record(self, step: int, context: TrainingContext) -> None:
        with preserving_state(context.network), torch.no_grad():
            context.network.eval()  # DetachedMean takes the mean of the batch all the same
            loss = F.cross_entropy(context.network(self.images), self.labels)
        layers = [unit.bn for unit in conv_norm_acts(context.network) if isinstance(unit.bn, DetachedMean)]
        norm = sum(float(layer.bias.detach().double().square().sum()) for layer in layers) ** 0.5
        self.write("growth", {"step": step, "norm": norm, "loss": float(loss)})
