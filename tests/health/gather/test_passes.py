"""The passes over all images against slow references in float64."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.health.batches import Batches
from bnlab.health.gather.layers import find_layers
from bnlab.health.gather.passes import Passes, run_passes
from bnlab.health.gather.recorder import EXACT
from bnlab.health.restore import restored
from bnlab.health.statistics import effective_batch
from bnlab.norm import BatchNorm2d, GhostBatchNorm2d, Whitening2d, recalibrate
from bnlab.progress import NullProgress

CPU = torch.device("cpu")


def network(norm: Any = nn.BatchNorm2d) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), norm(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 6, 3), norm(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
    )  # fmt: skip
    return model.eval()


def data(n: int = 20, size: int = 8) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x, y = torch.randn(n, 3, size, size) * 2 + torch.randn(n, 3, 1, 1), torch.randint(0, 3, (n,))
    return [*zip(x.split(size), y.split(size), strict=True)]


def run(model: nn.Module, batches: Any) -> Passes:
    with restored(model):
        return run_passes(model, find_layers(model), Batches(batches, CPU), NullProgress())


def by_batch(model: nn.Module) -> nn.Module:
    """A copy that normalises by the batch, in float64."""
    copied = copy.deepcopy(model).double()
    for layer in copied.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    return copied


def test_scores_are_those_of_evaluation_of_batches_and_of_recalibrated_statistics() -> None:
    model, batches = network(), data()
    found = run(model, batches)
    recalibrated = copy.deepcopy(model)
    recalibrate(recalibrated, batches)
    assert found.scores is not None
    for scores, reference in (
        (found.scores.running, model),
        (found.scores.batch, by_batch(model)),
        (found.scores.population, recalibrated),
    ):
        like = next(reference.parameters())
        expected = torch.cat([reference(x.to(like)).argmax(1) == y for x, y in batches])
        assert np.array_equal(scores, expected.double().numpy())


def test_population_statistics_are_those_of_recalibrate() -> None:
    model, batches = network(), data()
    found = run(model, batches)
    recalibrate(model, batches)
    for name, (mean, variance) in found.population.items():
        layer = model.get_submodule(name)
        torch.testing.assert_close(mean, layer.running_mean)
        torch.testing.assert_close(variance, layer.running_var)


def test_samples_are_the_moments_of_the_inputs() -> None:
    model, batches = network(), data()
    found = run(model, batches)
    first = model[0].double()(torch.cat([x for x, _ in batches]).double())  # N x C x H x W
    parts = [model[0](x.double()).mean((0, 2, 3)) for x, _ in batches]
    for sample in (found.evaluation["1"], found.batch["1"]):
        assert (sample.count, sample.batches) == (20 * 64, 3)
        np.testing.assert_allclose(sample.mean, first.mean((0, 2, 3)).detach(), atol=1e-6)
        np.testing.assert_allclose(sample.variance, first.var((0, 2, 3)).detach(), rtol=1e-5)
        assert float(first.detach().abs().max()) <= sample.largest < EXACT
        # batches of 8, 8 and 4: a squared distance of the last one counts half
        weights = np.array([8, 8, 4])
        means = torch.stack(parts).detach().numpy()
        scatter = (weights[:, None] * (means - np.average(means, 0, weights)) ** 2).sum(0)
        np.testing.assert_allclose(sample.between, scatter / 2 / 8, rtol=1e-4)
        assert sample.groups is not None
        np.testing.assert_allclose(sample.groups[:, 0], means, atol=1e-5)
    images = torch.stack([image.mean((1, 2)) for image in first]).split([8, 8, 4])
    within = sum(((part - part.mean(0)) ** 2).sum(0) for part in images) / 17
    np.testing.assert_allclose(found.evaluation["1"].between_images, within.detach(), rtol=1e-4)  # type: ignore[arg-type]
    assert found.batch["1"].between_images is None


def test_the_effective_batch_of_independent_values_is_their_number() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(50)).eval()
    found = run(model, [torch.randn(32, 50) for _ in range(40)])
    size, at_most = effective_batch(found.batch["0"], 1e-5) or (0, 0)
    assert size == pytest.approx(32, rel=0.1)
    assert size < at_most < 1.1 * size


def test_successive_differences_do_not_count_slow_drift() -> None:
    """The mean rises by 1 in each of 41 batches: their variance is 143.5, and half the squared step 0.5."""
    torch.manual_seed(0)
    drift = torch.arange(41.0)[:, None, None]
    found = run(nn.Sequential(nn.BatchNorm1d(3)).eval(), [*(torch.randn(500, 3) + drift)])
    sample = found.evaluation["0"]
    assert sample.successive is not None
    np.testing.assert_allclose(sample.between, 143.5, rtol=0.01)
    np.testing.assert_allclose(sample.successive, 0.5, rtol=0.05)


def test_successive_differences_of_batches_of_unequal_sizes() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(n, 3) for n in (8, 8, 4)]
    found = run(nn.Sequential(nn.BatchNorm1d(3)).eval(), batches).evaluation["0"]
    a, b, c = (batch.mean(0).numpy() for batch in batches)
    expected = (8 * 8 / 16 * (b - a) ** 2 + 8 * 4 / 12 * (c - b) ** 2) / 2 / 8
    np.testing.assert_allclose(found.successive, expected, rtol=1e-4)  # type: ignore[arg-type]


def test_where_an_image_has_several_rows_nothing_is_said_of_single_images() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x.flatten(0, 1))  # N * L x C

    found = run(Rows().eval(), [torch.randn(8, 5, 4) for _ in range(3)])
    assert found.evaluation["bn"].between_images is None


@pytest.mark.parametrize("norm", [BatchNorm2d, GhostBatchNorm2d, Whitening2d, nn.InstanceNorm2d, nn.SyncBatchNorm])
def test_all_kinds_of_layers_run_as_in_training(norm: Any) -> None:
    """Without dropout, and in this process alone."""
    options = {"affine": True, "track_running_stats": True} if norm is nn.InstanceNorm2d else {}
    if norm is GhostBatchNorm2d:
        options = {"ghost_size": 4}
    model, batches = network(lambda channels: norm(channels, **options)), data()
    found = run(model, batches)
    reference = copy.deepcopy(model)
    for layer in reference.modules():
        if isinstance(layer, norm):
            layer.train() if norm is not nn.SyncBatchNorm else layer._buffers.update(
                running_mean=None, running_var=None
            )
    expected = torch.cat([reference(x).argmax(1) == y for x, y in batches]).double().numpy()
    assert found.scores is not None
    assert np.array_equal(found.scores.batch, expected)
    assert bool(found.population) == (norm is not nn.InstanceNorm2d)


def test_a_layer_that_also_activates_is_measured_before_it() -> None:
    class NormReLU(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return F.relu(super().forward(input))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), NormReLU(4)).eval()
    x = torch.randn(8, 3, 5, 5)
    found = run(model, [x])
    np.testing.assert_allclose(found.batch["1"].mean, model[0](x).mean((0, 2, 3)).detach(), atol=1e-6)


def test_a_batch_with_one_value_a_channel_is_noted_and_run_by_running_statistics() -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4)).eval()
    found = run(model, [torch.randn(8, 4), torch.randn(1, 4)])
    assert found.single == {"1": 1}
    assert found.batch_sizes == (8, 1)


def test_values_that_are_not_finite_leave_the_other_layers() -> None:
    model = network()
    model[1].running_var[0] = torch.nan
    found = run(model, data())
    assert found.evaluation["1"].count > 0
    assert "5" not in found.evaluation
    assert found.batch["5"].count > 0
    assert found.scores is not None
    assert found.scores.running is not None
    assert found.scores.running.sum() == 0


def test_without_labels_there_are_no_scores() -> None:
    found = run(network(), [x for x, _ in data()])
    assert found.scores is None
    assert found.labels is None
    assert found.images == 20
