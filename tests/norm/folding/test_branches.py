"""Truth tests are traced both ways, in the forward of a model and in that of one module alone."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError

from bnlab.norm.folding.branches import own_graphs
from bnlab.norm.folding.trace import trace_regions


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


def test_an_error_of_another_file_is_no_refusal_of_the_model() -> None:
    regions, untraced = trace_regions(Helped())
    assert not regions and len(untraced) == 1


def test_own_graphs_show_modules_as_single_nodes_and_stored_tensors() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.gamma = Branching(), nn.Parameter(torch.ones(3))
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
