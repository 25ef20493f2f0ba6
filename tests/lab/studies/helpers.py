"""What the tests of all studies use."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from bnlab.lab.experiment import Experiment
from bnlab.lab.study import Conclusion
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import plot_svg

MakeExperiment = Callable[..., Experiment]


def has_no_number(evidence: Evidence) -> list[bool]:
    """For each seed, whether it shows nothing."""
    return [math.isnan(value) for value in evidence.values]


def draw(conclusion: Conclusion) -> None:
    """Draw all plots; a warning of the library that draws them is an error."""
    assert conclusion.plots
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in conclusion.plots.values():
            assert plot.title in plot_svg(plot)


@contextmanager
def unchanged(network: nn.Module) -> Iterator[None]:
    """Checks that the network, its flags and gradients, and torch's generator are afterwards what they were."""

    def flags() -> list[bool]:
        return [module.training for module in network.modules()] + [p.requires_grad for p in network.parameters()]

    def tensors() -> list[torch.Tensor]:
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        return [tensor.clone() for tensor in (*network.state_dict().values(), *gradients, torch.get_rng_state())]

    before, flags_before = tensors(), flags()
    yield
    assert flags() == flags_before
    assert len(before) == len(tensors())
    assert all(torch.equal(now, then) for now, then in zip(tensors(), before, strict=True))
