"""Where the channels of a layer's output are after what follows it, and who reads a value."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab.norm.folding.flow import CannotFold, Source, layer_after, readers, sources
from bnlab.norm.folding.fold import fold
from bnlab.norm.folding.trace import Region, trace_regions


class Net(nn.Module):
    def __init__(self, run: Callable[[Any, Tensor], Any], layer: nn.Module, bn: nn.Module, more: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.run, self.layer, self.bn, self.more = run, layer, bn, more
        nn.init.normal_(bn.running_mean)  # type: ignore[arg-type]
        nn.init.uniform_(bn.running_var, 0.1, 2)  # type: ignore[arg-type]
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def linear(run: Callable[[Any, Tensor], Any], norm: type[nn.Module] = nn.BatchNorm1d) -> Net:
    return Net(run, nn.Linear(4, 6), norm(6), nn.Identity())


def conv(
    run: Callable[[Any, Tensor], Any], norm: type[nn.Module] = nn.BatchNorm2d, more: nn.Module | None = None
) -> Net:
    return Net(run, nn.Conv2d(4, 6, 1), norm(6), more or nn.Identity())


FOLDS: dict[str, tuple[Net, tuple[int, ...]]] = {
    "flatten": (linear(lambda n, x: n.bn(n.layer(x).flatten(0, 1))), (3, 5, 4)),
    "flatten, and back": (linear(lambda n, x: n.bn((y := n.layer(x)).flatten(0, 1)).reshape_as(y)), (3, 5, 4)),
    "flatten all but the last": (linear(lambda n, x: n.bn(torch.flatten(n.layer(x), 0, end_dim=-2))), (3, 2, 5, 4)),
    "reshape": (linear(lambda n, x: n.bn(n.layer(x).reshape(-1, 6))), (3, 5, 4)),
    "view of a shape": (linear(lambda n, x: n.bn(n.layer(x).view((-1, 6)))), (3, 5, 4)),
    "transpose": (linear(lambda n, x: n.bn(n.layer(x).transpose(1, 2))), (3, 5, 4)),
    "transpose from behind": (linear(lambda n, x: n.bn(torch.swapaxes(n.layer(x), -1, -2))), (3, 5, 4)),
    "permute": (linear(lambda n, x: n.bn(n.layer(x).permute(0, 2, 1).contiguous())), (3, 5, 4)),
    "permute images": (linear(lambda n, x: n.bn(n.layer(x).permute((0, 3, 1, 2))), nn.BatchNorm2d), (3, 5, 2, 4)),
    "positions": (conv(lambda n, x: n.bn(n.layer(x).flatten(2)), nn.BatchNorm1d), (3, 4, 5, 2)),
    "some positions": (conv(lambda n, x: n.bn(torch.flatten(n.layer(x), start_dim=-2)), nn.BatchNorm1d), (3, 4, 5, 2)),
    "means": (conv(lambda n, x: n.bn(n.more(n.layer(x))), more=nn.AvgPool2d(2)), (3, 4, 4, 2)),
    "mean": (conv(lambda n, x: n.bn(n.more(n.layer(x))), more=nn.AdaptiveAvgPool2d(1)), (3, 4, 5, 2)),
    "copies": (conv(lambda n, x: n.bn(n.layer(x).clone().detach())), (3, 4, 5, 2)),
    "shape": (conv(lambda n, x: n.bn(y := n.layer(x)) + torch.zeros_like(y) + y.size(1) + y.new_ones(1)), (3, 4, 5, 2)),
}


@pytest.mark.parametrize("name", FOLDS)
@pytest.mark.parametrize("with_example", [False, True])
def test_what_folds(name: str, with_example: bool) -> None:
    model, shape = FOLDS[name]
    x = torch.randn(shape, dtype=torch.float64)
    folding = fold(model, x) if with_example else fold(model)
    assert (folding.folded, folding.kept) == ({"bn": ("layer",)}, {})
    torch.testing.assert_close(folding.model(x), model(x), rtol=1e-9, atol=1e-9)


KEPT: dict[str, tuple[Net, tuple[int, ...]]] = {
    "channels and positions": (conv(lambda n, x: n.bn(n.layer(x).flatten(1)[:, :6]), nn.BatchNorm1d), (3, 4, 1, 2)),
    "all": (linear(lambda n, x: n.bn(n.layer(x).flatten(0, 2)[None])), (1, 3, 2, 4)),
    "another width": (linear(lambda n, x: n.bn(n.layer(x).reshape(-1, 12)[:, ::2])), (4, 4)),
    "a width that mixes": (linear(lambda n, x: n.bn(n.layer(x).reshape(6, -1).t())), (4, 4)),
    "two dimensions": (linear(lambda n, x: n.bn(n.layer(x).transpose(0, 1)[:, :6])), (6, 4)),
    "channels moved": (conv(lambda n, x: n.bn(n.layer(x).transpose(1, 2)[:, :6])), (3, 4, 6, 2)),
    "channels moved last": (linear(lambda n, x: n.bn(n.layer(x).permute(2, 1, 0))), (3, 6, 4)),
    "padded means": (conv(lambda n, x: n.bn(n.more(n.layer(x))), more=nn.AvgPool2d(2, padding=1)), (3, 4, 4, 2)),
    "largest": (conv(lambda n, x: n.bn(n.more(n.layer(x))), more=nn.MaxPool2d(2)), (3, 4, 4, 2)),
    "its values": (conv(lambda n, x: n.bn(y := n.layer(x)) + y.new_tensor([1.0]) * y), (3, 4, 5, 2)),
    "data": (conv(lambda n, x: n.bn(y := n.layer(x)) + y.data), (3, 4, 5, 2)),
    "written into": (conv(lambda n, x: (y := n.layer(x), y.mul_(2), n.bn(y))[2]), (3, 4, 5, 2)),
    "added to a shape's owner": (conv(lambda n, x: n.bn(y := n.layer(x)) + y.expand_as(y)), (3, 4, 5, 2)),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_does_not_fold(name: str) -> None:
    model, shape = KEPT[name]
    x = torch.randn(shape, dtype=torch.float64)
    folding = fold(model, x)
    assert folding.folded == {}
    assert torch.equal(folding.model(x), model(x))


def test_features_in_another_place_are_an_error_without_an_example() -> None:
    folding = fold(linear(lambda n, x: n.bn(n.layer(x).transpose(1, 2))))
    with pytest.raises(ValueError, match="bn was folded into layer for N x C x L"):
        folding.model(torch.randn(3, 6, 5, 4).double())


def region_of(model: nn.Module) -> Region:
    (region,), _ = trace_regions(model)
    return region


def test_sources_and_readers() -> None:
    region = region_of(linear(lambda n, x: n.bn(y := n.layer(x).transpose(1, 2)) + y.shape[0]))
    nodes = {str(node.target): node for node in region.nodes()}
    assert sources(nodes["transpose"], region) == Source([nodes["layer"]], 1, 3)
    assert readers(nodes["transpose"]) == [nodes["bn"]] and len(nodes["transpose"].users) == 2
    with pytest.raises(CannotFold, match="the input of the model comes before it") as reason:
        sources(nodes["x"], region)
    assert not reason.value.unseen


def test_the_layer_after() -> None:
    region = region_of(conv(lambda n, x: n.layer(n.more(n.bn(x))), more=nn.Dropout()))
    nodes = {str(node.target): node for node in region.nodes()}
    assert layer_after(nodes["bn"], region) is nodes["layer"]
    for run in (lambda n, x: n.layer(y := n.bn(x)) + y, lambda n, x: n.layer(n.bn(x).relu())):
        region = region_of(conv(run))
        with pytest.raises(CannotFold):
            layer_after(next(node for node in region.nodes() if node.target == "bn"), region)
