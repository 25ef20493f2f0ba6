"""Which parts of a model are traced, and what a trace finds in them."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.norm.folding.trace import has_plain_forward, is_leaf, is_norm, trace_regions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.bn(self.conv(x))
        return 2 * x if twice else x


class Looping(nn.Module):
    """The number of its steps depends on its input, so it cannot be traced; its block can."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Block(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.last(self.block(x)) for _ in range(x.shape[0])]


class Noisy(Block):
    """Its forward draws random numbers and changes a buffer."""

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        self.bn.running_mean += torch.rand(3)
        return super().forward(x, twice)


def test_a_region_has_a_graph_for_each_way_to_run() -> None:
    model = Block()
    (region,), untraced = trace_regions(model)
    assert untraced == {}
    assert region.name == "the model"
    assert len(region.graphs) == 2
    assert region.calls == {model.conv, model.bn}
    described = [region.describe(node) for node in region.graphs[0].nodes if node.op in ("placeholder", "call_module")]
    assert described[0] == "the input of the model"
    assert "bn (BatchNorm2d)" in described


def test_parts_of_a_model_that_cannot_be_traced_are_traced_alone() -> None:
    model = Looping()
    regions, untraced = trace_regions(model)
    assert [region.name for region in regions] == ["block"]
    assert untraced.keys() == {model.last}
    assert untraced[model.last].startswith("the model cannot be traced without an example: ")


def test_a_full_memory_is_not_taken_for_a_model_that_cannot_be_traced() -> None:
    class Large(Block):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            raise MemoryError

    with pytest.raises(MemoryError):
        trace_regions(Large())


def test_a_layer_that_other_parts_use_is_shared() -> None:
    model = Looping()
    (region,), _ = trace_regions(model)
    assert model.block.bn not in region.shared
    model.last = model.block.bn
    (region,), _ = trace_regions(model)
    assert region.module is model.block
    assert model.block.bn in region.shared
    assert model.block.conv not in region.shared


def test_a_trace_changes_neither_the_model_nor_the_random_numbers() -> None:
    model = Noisy()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    trace_regions(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnInit(nn.Linear):
    pass


@pytest.mark.parametrize(
    ("layer", "plain"),
    [
        (nn.Conv2d(1, 1, 1), True),
        (nn.ConvTranspose1d(1, 1, 1), True),
        (OwnInit(1, 1), True),
        (OwnForward(1, 1), False),
        (nn.ReLU(), False),
    ],
)
def test_only_layers_of_torch_have_a_plain_forward(layer: nn.Module, plain: bool) -> None:
    assert has_plain_forward(layer) == plain
    if plain:
        layer.forward = lambda x: x  # type: ignore[method-assign, assignment]
        assert not has_plain_forward(layer)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.running_var = torch.ones(3)


def test_what_is_batch_normalisation() -> None:
    assert is_norm(Frozen()) and is_norm(nn.BatchNorm1d(2)) and is_norm(nn.SyncBatchNorm(2))
    assert not is_norm(nn.InstanceNorm2d(3, track_running_stats=True))
    assert not is_norm(nn.BatchNorm2d(3, track_running_stats=False).register_module("x", None) or nn.GroupNorm(1, 3))


def test_what_a_graph_shows_as_one_node() -> None:
    class Tied(nn.Conv2d):
        """It convolves by the weight of another layer, which the graph has to show."""

        def forward(self, input: Tensor) -> Tensor:
            return super()._conv_forward(input, self.tied[0].weight, self.bias)

    class Within(nn.Conv2d):
        pass

    tied, within = Tied(3, 3, 1), OwnForward(3, 3)
    tied.tied = [nn.Conv2d(3, 3, 1)]
    assert is_leaf(within) and is_leaf(Within(3, 3, 1)) and not is_leaf(tied)
    within.bn = nn.BatchNorm1d(3)
    assert not is_leaf(within)
