"""Modes, outputs alone and in a batch, and the caller's validation."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health
from bnlab.health.gather.modes import differ, drops
from tests.health.checks.networks import sound_network, teacher_batches

BATCHES = teacher_batches(sound_network(), size=8)


def snapshot(network: nn.Module) -> tuple[Any, ...]:
    state = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules()]
    return state, modes, hooks, torch.get_rng_state()


def assert_same(network: nn.Module, before: tuple[Any, ...]) -> None:
    state, modes, hooks, random = snapshot(network)
    assert all(torch.equal(state[key], before[0][key]) for key in before[0])
    assert (modes, hooks) == before[1:3]
    assert torch.equal(random, before[3])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_validation_that_is_broken_off_is_undone(error: type[BaseException]) -> None:
    """Its exception passes through unchanged."""
    network = sound_network()
    before, raised = snapshot(network), error("by the caller")

    def validate(model: nn.Module) -> None:
        model.train()(torch.randn(8, 3, 8, 8))
        model[9].weight.data.zero_()
        raise raised

    with pytest.raises(error) as caught:
        health.diagnose(network, BATCHES, validate=validate)
    assert caught.value is raised
    assert_same(network, before)


def test_outputs_are_compared_on_a_copy() -> None:
    network = sound_network()
    network[1].train()
    before = snapshot(network)
    alone = health.diagnose(network, BATCHES).evidence.parts["alone"]
    assert (alone.images, alone.dtype, alone.depends_on_batch, alone.is_random) == (4, "float64", True, False)
    assert_same(network, before)


def test_rounding_is_far_below_the_limit() -> None:
    alone = health.diagnose(sound_network(), BATCHES).evidence.parts["alone"]
    assert alone.alone < 1e-12
    assert alone.again == alone.again_in_evaluation == 0


def test_pairs_stand_for_single_images_that_are_refused() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: Tensor) -> Tensor:
            if len(x) < 2:
                raise ValueError("pairs, please")
            return self.inner(x) - self.inner(x).mean(0)

    assert health.diagnose(Pairs().eval(), BATCHES).evidence.parts["alone"].depends_on_batch


def test_an_output_without_a_row_for_each_image_is_not_compared() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = sound_network()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(0)[:3]

    report = health.diagnose(Mean().eval(), [x for x, _ in BATCHES])
    assert report.evidence.parts["alone"] is None
    assert "BN002" not in report


def test_the_validation_gets_the_model_as_it_was_passed() -> None:
    model = nn.DataParallel(sound_network()).eval()
    passed: list[nn.Module] = []
    health.diagnose(model, BATCHES, validate=passed.append)
    assert passed == [model]


def test_which_modules_drop_values() -> None:
    class DropPath(nn.Module):
        def __init__(self, drop_prob: float) -> None:
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, self.drop_prob, self.training)

    assert all(
        map(drops, [nn.Dropout(0.1), nn.AlphaDropout(), DropPath(0.2), nn.MultiheadAttention(4, 1, dropout=0.1)])
    )
    assert not any(
        map(drops, [nn.Dropout(0.0), DropPath(0.0), nn.MultiheadAttention(4, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)])
    )


def test_statistics_differ_by_value_and_by_name() -> None:
    one = {"running_mean": torch.tensor([1.0, torch.nan])}
    assert not differ(one, copy.deepcopy(one))
    assert differ(one, {"running_mean": torch.tensor([1.0, 0.0])})
    assert differ(one, {})
    assert differ(one, {"running_mean": torch.ones(3)})
