"""Which parts of a model are traced, and what a trace finds in them."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.norm.fold_trace import has_plain_forward, trace_regions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        x = self.bn(self.conv(x))
        return 2 * x if twice else x


class Branching(nn.Module):
    """Its forward depends on the values of its input, so it cannot be traced; its block can."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Block(), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(x)) if x.sum() > 0 else x


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
    model = Branching()
    regions, untraced = trace_regions(model)
    assert [region.name for region in regions] == ["block"]
    assert untraced.keys() == {model.last}
    assert untraced[model.last].startswith("the model cannot be traced: ")


def test_a_full_memory_is_not_taken_for_a_model_that_cannot_be_traced() -> None:
    class Large(Block):
        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            raise MemoryError

    with pytest.raises(MemoryError):
        trace_regions(Large())


def test_a_layer_that_other_parts_use_is_shared() -> None:
    model = Branching()
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
