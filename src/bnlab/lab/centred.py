"""The example of sec. 2 of the paper: a bias, and a mean that the gradient step may ignore."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.lab.cells import Place
from bnlab.lab.course import Witness, restored, train
from bnlab.lab.records import Tables
from bnlab.nets.blocks import units_of
from bnlab.nets.build import build
from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe
from bnlab.training.judge import sample_batches
from bnlab.training.loop import Trainee

WITHIN, OUTSIDE, SCALED = "mean within the step", "mean outside", "mean and variance outside"
ARMS = (WITHIN, OUTSIDE, SCALED)
ALONE, ALL = "the biases alone", "everything"
_LOOKED_AT = 512  # photos


class Centred(nn.Module):
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


def detached(place: Place, recipe: Recipe, how: dict[str, Any]) -> Tables:
    """A network of such layers: of it the biases alone are trained, or everything."""
    witness = Growth(how["every"])
    make = partial(make_network, arm=how["arm"], alone=how["learned"] == ALONE)
    course = train(place, recipe, witness=witness, make=make)
    return {"growth": course.tables["growth"], "trained": course.tables["accuracy"]}


def make_network(recipe: Recipe, classes: int, arm: str, *, alone: bool) -> TableNetwork:
    """A network with these layers in place of BN; `alone`: nothing else of it is trained."""
    norm = partial(Centred, arm=arm)
    network = build(recipe.network, classes=classes, norm=norm, width=recipe.width, seed=recipe.seed)
    for unit in units_of(network):
        unit.layer.requires_grad_(not alone)
    network.fc.requires_grad_(not alone)
    return network


class Growth(Witness):
    """The norm of all biases of `Centred` layers, and the loss on the same photos each time."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self.images = self.labels = torch.empty(0)

    def begin(self, trainee: Trainee) -> None:
        """Choose the photos, of train."""
        loader = trainee.loader
        chosen = loader.sample(_LOOKED_AT)
        batches = sample_batches(
            [loader.paths[i] for i in chosen], trainee.view, batch_size=_LOOKED_AT, device=trainee.device
        )
        self.images, self.labels = next(batches), torch.from_numpy(loader.labels[chosen]).to(trainee.device)

    def before(self, step: int, trainee: Trainee) -> None:
        """What it begins with."""
        if step == 0:
            self._look(0, trainee)

    def after(self, step: int, trainee: Trainee) -> None:
        """Look, where it is time."""
        if (step + 1) % self.every == 0:
            self._look(step + 1, trainee)

    def _look(self, step: int, trainee: Trainee) -> None:
        with restored(trainee.network), torch.no_grad():
            trainee.network.eval()  # Centred takes the batch's mean all the same
            loss = F.cross_entropy(trainee.network(self.images), self.labels)
        layers = [unit.bn for unit in units_of(trainee.network) if isinstance(unit.bn, Centred)]
        norm = sum(float(layer.bias.detach().double().square().sum()) for layer in layers) ** 0.5
        self.write("growth", {"step": step, "norm": norm, "loss": float(loss)})
