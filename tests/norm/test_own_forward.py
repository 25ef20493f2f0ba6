"""Layers with a forward of another library: compiled, traced and run again by a checkpoint. See test_convert.py too."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bnlab import norm
from bnlab.norm.folding.branches import own_graphs
from bnlab.norm.own_forward import make_traceable, normalises
from tests.norm.subclasses import Activated, Direct, Doubled, Failing, Twice

KINDS = pytest.mark.parametrize("kind", [Activated, Doubled, Direct])


def images() -> Tensor:
    return torch.randn(4, 5, 6, 6, generator=torch.Generator().manual_seed(0))


@KINDS
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_move_the_statistics_once(kind: type[nn.Module], momentum: float | None, reentrant: bool) -> None:
    found = []
    for checkpoints in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(5, 5, 1), kind(5, momentum=momentum), nn.Conv2d(5, 5, 3), nn.Sigmoid())
        norm.convert(model)
        x = images().requires_grad_()
        y = checkpoint(model, x, use_reentrant=reentrant) if checkpoints else model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    assert model[1].num_batches_tracked == 1
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@KINDS
def test_population_statistics(kind: type[nn.Module]) -> None:
    layer: Any = norm.convert(kind(5)).model
    layer.num_batches_tracked.fill_(3)
    layer.statistics = "population"
    before = layer.running_mean.clone()
    layer.eval()(images())
    layer.train()(images())
    assert layer.num_batches_tracked == 0 and torch.equal(layer.running_mean, before)
    layer.statistics = "batch"
    y = layer.eval()(images())
    assert torch.equal(y, layer.train()(images()))


def test_a_batch_norm_within_the_forward_keeps_its_statistics() -> None:
    class Two(Activated):
        def __init__(self, channels: int) -> None:
            super().__init__(channels)
            self.act = nn.BatchNorm2d(channels)

    model = nn.Sequential(Two(5))
    expected = copy.deepcopy(model)(images())
    assert norm.convert(model).converted == ("0", "0.act")
    assert torch.equal(model(images()), expected)
    assert model[0].num_batches_tracked == model[0].act.num_batches_tracked == 1


@KINDS
def test_they_are_traced_as_one_call(kind: type[nn.Module]) -> None:
    model = norm.convert(nn.Sequential(nn.Conv2d(5, 5, 1), kind(5))).model
    traced = fx.symbolic_trace(copy.deepcopy(model))
    assert torch.equal(traced(images()), model(images()))
    assert traced.get_submodule("1").num_batches_tracked == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of its compiler
@pytest.mark.parametrize("kind", [Activated, Doubled])
@pytest.mark.parametrize("change", [norm.convert, norm.convert_sync])
@pytest.mark.parametrize("training", [True, False])
def test_they_compile_in_one_piece(kind: type[nn.Module], change: Any, training: bool) -> None:
    model = change(kind(5)).model.train(training)
    expected = copy.deepcopy(model)
    y = torch.compile(model, backend="eager", fullgraph=True)(images())
    assert torch.equal(y, expected(images()))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), expected.buffers(), strict=True))


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.BatchNorm2d(5), "its input"),
        (Activated(5), "its input"),
        (norm.convert(Activated(5)).model, "its input"),
        (Doubled(5), "something else"),
        (norm.convert_sync(Doubled(5)).model, "something else"),
        (Failing(5), "something else"),  # for all that can be known
        (Twice(5), "several times"),
    ],
)
def test_what_a_layer_normalises(layer: nn.Module, what: str) -> None:
    assert normalises(layer) == what


def test_a_converted_layer_is_traced_with_the_forward_that_it_had() -> None:
    layer = norm.convert(Doubled(5).eval()).model
    copied = copy.deepcopy(layer)
    make_traceable(copied)
    assert type(copied) is Doubled
    (graph,) = own_graphs(layer)
    assert [node.target for node in graph.nodes if node.op == "call_function"].count(F.batch_norm) == 1
    assert torch.equal(copied(images()), layer(images()))
