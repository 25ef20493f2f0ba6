"""Which parts of a model are traced, and what a trace finds in them."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from bnlab.norm.fold_trace import has_plain_forward, is_leaf, is_norm, own_graphs, trace_regions


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


class Branching(nn.Module):
    """Its truth tests have four outcomes, of which one is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            raise ValueError("images only")
        assert x.shape[1] == 3
        x = self.conv(x) if math.ceil(x.shape[2] / 2) > 4 else x
        return self.bn(x) if x.sum() > 0 else x


def test_truth_tests_are_traced_both_ways() -> None:
    model = Branching()
    (region,), untraced = trace_regions(model)
    assert not untraced and region.module is model
    called = {tuple(str(node.target) for node in graph.nodes if node.op == "call_module") for graph in region.graphs}
    assert called == {(), ("conv",), ("bn",), ("conv", "bn")}


class Endless(Branching):
    def forward(self, x: Tensor) -> Tensor:
        while x.sum() > 0:
            x = self.bn(self.conv(x))
        return x


class Many(Branching):
    def forward(self, x: Tensor) -> Tensor:
        for factor in range(10):
            x = self.bn(self.conv(x)) * factor if x.sum() > factor else x
        return x


class Refusing(Branching):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("never")


class Helped(Branching):
    """A function of another file refuses a proxy, which it would not do to a tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.shape[0] > 1 else self.conv(torch.testing.assert_close(x, 0.0))


class Unsuitable(Branching):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1 and not isinstance(x, Tensor):
            raise TypeError("not a tensor")
        return self.bn(self.conv(x))


class Broken(Branching):
    """A trace of one way fails: that it is a way shows nothing about the others."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) if x.shape[0] > 1 else self.conv(x) + next(iter(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Endless(), "its forward has more than 16 truth tests"),
        (Many(), "its forward has more than 32 ways to run"),
        (Refusing(), "never"),
        (Unsuitable(), "not a tensor"),
        (Broken(), "Proxy object cannot be iterated"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_traced(model: nn.Module, reason: str) -> None:
    regions, untraced = trace_regions(model)
    assert not regions
    assert untraced == {model.bn: f"the model cannot be traced without an example: {reason}"}


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))
        self.running_var = torch.ones(3)


def test_an_error_of_another_file_is_no_refusal_of_the_model() -> None:
    regions, untraced = trace_regions(Helped())
    assert not regions and len(untraced) == 1


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


def test_own_graphs_show_modules_as_single_nodes_and_stored_tensors() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.gamma = Block(), nn.Parameter(torch.ones(3))
            self.register_buffer("beta", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) * self.gamma + self.beta

    model = Own()
    (graph,) = own_graphs(model)
    shown = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    assert shown == ["block", "gamma", "beta"]
    model.forward = lambda x: x  # type: ignore[method-assign, assignment, misc]
    with pytest.raises(TraceError, match="its forward was replaced"):
        own_graphs(model)
