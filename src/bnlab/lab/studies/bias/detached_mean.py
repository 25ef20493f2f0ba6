"""The example of sec. 2 of the paper: a bias, and a mean that the gradient step may ignore."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.lab.measurements import JobContext
from bnlab.lab.records import Results
from bnlab.lab.replay import preserving_state
from bnlab.lab.trained_network import Probe, train
from bnlab.nets.blocks import conv_norm_acts
from bnlab.nets.build import build
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.training.build import TrainingContext
from bnlab.training.validate import calibration_batches

WITHIN, OUTSIDE, SCALED = "mean within the step", "mean outside", "mean and variance outside"
ARMS = (WITHIN, OUTSIDE, SCALED)
ALONE, ALL = "the biases alone", "everything"
_LOOKED_AT = 512  # photos


class DetachedMean(nn.Module):
    """The paper's example: x = u + b, and from it x - E[x], over the batch; N x C x ... in and out.

    Its gradient follows E[x] too, or ignores that it depends on b and u ("outside"). "mean and variance outside"
    divides by the standard deviation besides, and ignores that this depends on u.
    """

    def __init__(self, channels: int, arm: str) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.arm = arm

    def forward(self, u: Tensor) -> Tensor:
        """N x C x ... as it came."""
        x = u + self.bias.view(-1, *[1] * (u.ndim - 2))  # N x C x ...
        others = [d for d in range(x.ndim) if d != 1]
        mean = x.mean(others, keepdim=True)  # 1 x C x ...
        x = x - (mean if self.arm == WITHIN else mean.detach())  # N x C x ...
        if self.arm == SCALED:
            x = x / (x.detach().square().mean(others, keepdim=True) + 1e-5).sqrt()  # N x C x ...
        return x


def detached(job: JobContext, recipe: Recipe, how: dict[str, Any]) -> Results:
    """A network of such layers: of it the biases alone are trained, or everything."""
    probe = Growth(how["every"])
    make = partial(make_network, arm=how["arm"], alone=how["learned"] == ALONE)
    trained = train(job, recipe, probe=probe, make=make)
    return {"growth": trained.results["growth"], "trained": trained.results["accuracy"]}


def make_network(recipe: Recipe, classes: int, arm: str, *, alone: bool) -> TableNetwork:
    """A network with these layers in place of BN; `alone`: nothing else of it is trained."""
    norm = partial(DetachedMean, arm=arm)
    network = build(recipe.network, classes=classes, norm=norm, width=recipe.width, seed=recipe.seed)
    for unit in conv_norm_acts(network):
        unit.layer.requires_grad_(not alone)
    network.fc.requires_grad_(not alone)
    return network


class Growth(Probe):
    """The norm of all biases of `DetachedMean` layers, and the loss on the same photos each time."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.images = self.labels = torch.empty(0)

    def begin(self, context: TrainingContext) -> None:
        """Choose the photos, of train."""
        loader = context.loader
        chosen = loader.sample(_LOOKED_AT)
        batches = calibration_batches(
            [loader.paths[i] for i in chosen], context.preprocessing, batch_size=_LOOKED_AT, device=context.device
        )
        self.images, self.labels = next(batches), torch.from_numpy(loader.labels[chosen]).to(context.device)

    def before(self, step: int, context: TrainingContext) -> None:
        """What it begins with."""
        if step == 0:
            self._look(0, context)

    def after(self, step: int, context: TrainingContext) -> None:
        """Look, where it is time."""
        if (step + 1) % self.every == 0:
            self._look(step + 1, context)

    def _look(self, step: int, context: TrainingContext) -> None:
        with preserving_state(context.network), torch.no_grad():
            context.network.eval()  # Centred takes the batch's mean all the same
            loss = F.cross_entropy(context.network(self.images), self.labels)
        layers = [unit.bn for unit in conv_norm_acts(context.network) if isinstance(unit.bn, DetachedMean)]
        norm = sum(float(layer.bias.detach().double().square().sum()) for layer in layers) ** 0.5
        self.write("growth", {"step": step, "norm": norm, "loss": float(loss)})
