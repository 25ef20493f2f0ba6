import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bnlab.data.dataset import Dataset, open_recorded_data
from bnlab.lab.measurements import JobContext
from bnlab.lab.studies.inference_statistics import ema_statistics as statistics
from bnlab.lab.studies.inference_statistics.ema_statistics import EmaStatistics, counts
from bnlab.lab.trained_network import Probe, train
from bnlab.training.build import TrainingContext
from tests.lab.studies.helpers import MakeExperiment, unchanged


class Until(Probe):
    """Records the running statistics after each step, and checks that a probe leaves everything unchanged."""

    def __init__(self, inner: EmaStatistics, dataset: Dataset) -> None:
        super().__init__()
        self.inner, self.dataset, self.batches = inner, dataset, list[torch.Tensor]()

    def begin(self, context: TrainingContext) -> None:
        self.inner.begin(context)

    def after(self, step: int, context: TrainingContext) -> None:
        network = context.network
        self.batches.append(statistics.read(network))
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        with unchanged(network):
            self.inner.after(step, context)
        network.zero_grad()


def test_the_averages_are_those_that_training_keeps(
    make_experiment: MakeExperiment, job: JobContext, tmp_path: Path
) -> None:
    recipe = make_experiment(size=16).recipe("bn_mlp", validate_every=100)
    dataset = open_recorded_data(job.split)
    probe = Until(EmaStatistics(dataset, [2]), dataset)
    of_batches = train(
        replace(job, folder=tmp_path / "a"), recipe.model_copy(update={"norm_momentum": 1.0}), probe=probe
    )
    for momentum in (0.5, 0.01):
        usual = train(
            replace(job, folder=tmp_path / f"{momentum}"), recipe.model_copy(update={"norm_momentum": momentum})
        ).context.network
        kept = statistics.read(usual)
        torch.testing.assert_close(probe.inner.averages[momentum], kept, rtol=1e-5, atol=1e-6)
    weights = [dict(n.named_parameters()) for n in (of_batches.context.network, usual)]
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for w in weights), strict=True))
    # Without what it began with, an average is the batches' mean, each weighed by its age.
    weigh = torch.tensor([0.9 ** (5 - i) for i in range(6)], dtype=torch.float64)
    mean = (torch.stack(probe.batches).double() * weigh[:, None]).sum(0) / weigh.sum()
    torch.testing.assert_close(probe.inner.corrected(0.1, 6).double(), mean, rtol=1e-4, atol=1e-5)
    again = EmaStatistics(dataset, [2])
    again.load_state_dict(probe.inner.state_dict())
    again.begin(of_batches.context)
    assert torch.equal(again.averages[0.5], probe.inner.averages[0.5])
    again.begin(replace(of_batches.context, device="meta"))  # what was kept on the CPU goes on where training does
    assert {kept.device.type for kept in (again.initial, *again.averages.values())} == {"meta"}
    assert again.results["probes"]


def test_counts_are_powers_of_two_and_all() -> None:
    assert counts(40) == [8, 16, 32, 40]
    assert counts(32) == [8, 16, 32]
    assert counts(8) == [8]


def test_distances_are_root_mean_squares_over_channels_that_vary() -> None:
    whole = torch.tensor([0.0, 0.0, 5.0, 9.0, 1.0, 4.0, 0.0, 1.0])
    few = torch.tensor([0.3, 0.8, 5.0, 0.0, math.e, 4.0, 0.0, 0.0])
    mean_off, variance_off = statistics.distances(few, whole)
    assert mean_off == pytest.approx(math.sqrt((0.3**2 + 0.4**2) / 2), rel=1e-6)
    assert variance_off == pytest.approx(math.sqrt(1 / 2), rel=1e-6)
    assert statistics.distances(whole, whole) == (0.0, 0.0)
