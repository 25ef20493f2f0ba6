"""Each repair on a copy of a model, against what arithmetic says."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bnlab import norm
from bnlab.errors import UsageError
from bnlab.health import repairs
from bnlab.health.batches import Batches
from tests.health.checks.networks import sound_network

CPU = torch.device("cpu")


def images(n: int = 64, seed: int = 3) -> Tensor:
    return 2 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) + 1


def batches(x: Tensor | None = None) -> Batches:
    return Batches([*(images() if x is None else x).split(16)], CPU)


def statistics(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if "running" in name]


def apply(repair: repairs.Repair, model: nn.Module, given: Batches | None = None) -> repairs.Changes:
    with torch.no_grad():
        return repair.apply(model, given or batches())


@pytest.mark.parametrize("layer_by_layer", [False, True])
def test_recalibrate_is_that_of_norm(layer_by_layer: bool) -> None:
    model, other = sound_network(), sound_network()
    changes = apply(repairs.recalibrate(layer_by_layer=layer_by_layer), model)
    norm.recalibrate(other, [*images().split(16)], layer_by_layer=layer_by_layer)
    assert changes.layers == ("1", "4")
    torch.testing.assert_close(statistics(model), statistics(other), rtol=0, atol=0)


def test_recalibrate_skips_what_is_frozen() -> None:
    model = sound_network()
    norm.freeze(model[1])
    changes = apply(repairs.recalibrate(), model)
    assert (changes.layers, dict(changes.skipped)) == (("4",), {"1": "it is frozen"})


def test_freeze() -> None:
    model = sound_network()
    assert apply(repairs.freeze(), model).layers == ("1", "4")
    model.train()
    assert not model[1].training
    assert not model[1].weight.requires_grad


def test_adapt_merges_moments_by_weight() -> None:
    """The first layer gets the images, so its new statistics are known: w old + (1 - w) new, and the distance."""
    for prior, weight in ((64, 0.5), (0, 0.0), (192, 0.75)):
        model, new = sound_network(), sound_network()
        norm.recalibrate(new, [*images().split(16)])
        (m0, v0), (m1, v1) = statistics(model)[:2], statistics(new)[:2]
        assert apply(repairs.adapt(prior), model).layers == ("1", "4")
        mean, variance = statistics(model)[:2]
        torch.testing.assert_close(mean, weight * m0 + (1 - weight) * m1)
        torch.testing.assert_close(variance, weight * v0 + (1 - weight) * v1 + weight * (1 - weight) * (m0 - m1) ** 2)


def test_merge_ranks_changes_statistics_alone() -> None:
    model, states = sound_network(), [sound_network(seed).state_dict() for seed in (1, 2)]
    weights = model[0].weight.clone()
    assert apply(repairs.merge_ranks(states), model).layers == ("1", "4")
    assert torch.equal(model[0].weight, weights)
    assert torch.equal(model[1].running_var, norm.merge_ranks(states)["1.running_var"])
    short = [{k: v for k, v in state.items() if k.startswith("1.")} for state in states]
    assert "4.running_mean" in apply(repairs.merge_ranks(short), model).skipped["4"]


def test_merge_ranks_takes_what_a_wrapper_saved() -> None:
    states = [sound_network(seed).state_dict() for seed in (1, 2)]
    model, wrapped = sound_network(), sound_network()
    apply(repairs.merge_ranks(states), model)
    named = [{f"module.{name}": tensor for name, tensor in state.items()} for state in states]
    assert apply(repairs.merge_ranks(named), wrapped).layers == ("1", "4")
    assert torch.equal(wrapped[4].running_var, model[4].running_var)


def test_momentum_and_eps_are_set_where_they_differ() -> None:
    model = sound_network()
    model[1].momentum = 0.5
    assert apply(repairs.set_momentum(0.5), model).layers == ("4",)
    assert model[4].momentum == 0.5
    assert apply(repairs.set_momentum(None), model).layers == ("1", "4")
    assert apply(repairs.set_eps(1e-3), model).layers == ("1", "4")
    assert model[1].eps == 1e-3


@pytest.mark.parametrize(
    "make", [lambda: repairs.set_eps(0), lambda: repairs.set_momentum(1.5), lambda: repairs.adapt(-1)]
)
def test_numbers_out_of_range_are_refused(make: object) -> None:
    with pytest.raises(UsageError):
        make()  # type: ignore[operator]


def with_bias() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), norm.BatchNorm2d(8)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    ).eval()


def test_a_dropped_bias_changes_no_output() -> None:
    model = with_bias()
    nn.init.constant_(model[0].bias, 3.0)
    before, mean = copy.deepcopy(model), model[1].running_mean.clone()
    changes = apply(repairs.drop_bias(), model)
    assert (changes.layers, dict(changes.skipped)) == (("1", "4"), {})
    assert not model[0].bias.any()
    assert model[7].bias.any()
    torch.testing.assert_close(model[1].running_mean, mean - 3)
    with torch.no_grad():
        torch.testing.assert_close(model(images()), before(images()), rtol=1e-4, atol=1e-4)
    assert apply(repairs.drop_bias(), model).layers == ()


class Shared(nn.Module):
    """The output of the convolution is read by a layer and by a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)  # N x 8 x 6 x 6
        return self.bn(x) + x


def test_a_bias_that_something_else_reads_stays() -> None:
    model = Shared().eval()
    before = model.conv.bias.clone()  # type: ignore[union-attr]
    changes = apply(repairs.drop_bias(), model)
    assert changes.layers == ()
    assert "reads the output of conv" in changes.skipped["bn"]
    assert torch.equal(model.conv.bias, before)  # type: ignore[arg-type]


def test_a_bias_that_two_layers_hold_stays() -> None:
    model = with_bias()
    model[3].bias = model[7].bias = nn.Parameter(torch.ones(8))
    model[7] = nn.Linear(8, 8)
    model[7].bias = model[3].bias
    changes = apply(repairs.drop_bias(), model)
    assert changes.layers == ("1",)
    assert "is shared" in changes.skipped["4"]
