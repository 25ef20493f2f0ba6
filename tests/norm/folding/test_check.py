"""When two models' outputs count as the same: in every precision, of every kind, and only if nothing else differs."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab.norm.folding.check import _off, _tensors, check_outputs, run
from bnlab.norm.folding.fold import fold


class Deep(nn.Module):
    """Six blocks and a head, then a function of the output; `lie` adds what no graph shows."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda y: y, lie: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.after, self.lie = after, lie
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)) for _ in range(6))
        self.head = nn.Linear(6, 5)
        for block in self.blocks:
            norm = block[1]
            assert isinstance(norm, nn.BatchNorm2d)
            nn.init.normal_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.05, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
        self.eval()

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            h = block[0](x)
            y = block[1](h)
            x = F.relu(y + h if self.lie and isinstance(h, Tensor) else y)  # false while tracing
        return self.after(self.head(x.mean((2, 3))))


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(8, 6, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)


TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_precision_folds(dtype: torch.dtype) -> None:
    model, x = Deep().to(dtype), images(dtype)
    folding = fold(model, x)
    assert len(folding.folded) == 6
    with torch.no_grad():
        exact = Deep().to(dtype).double()(x.double())
        off, own = (_off(found(x), exact) for found in (folding.model, model))
    assert off < 4 * own + 1e-6


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("after", [lambda y: y, lambda y: (y * 1000).long()], ids=["logits", "integers"])
def test_in_every_precision_a_model_that_does_more_than_its_graph_is_refused(
    dtype: torch.dtype, after: Callable[[Tensor], Tensor]
) -> None:
    with pytest.raises(ValueError, match=r"differs by .* the model does what its graph does not show"):
        fold(Deep(after, lie=True).to(dtype), images(dtype))


def test_autocast_and_mixed_types() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert len(fold(Deep(), images()).folded) == 6
    mixed = Mixed()
    assert fold(mixed, images()).folded == {"norm": ("conv",)}


class Mixed(nn.Module):
    """A convolution in half precision within a model in single precision; it runs in no other type."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(6, 6, 3).half(), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.half()).float())


@pytest.mark.parametrize(
    "after",
    [
        lambda y: y.argmax(1),
        lambda y: (y, {"classes": y.argmax(1), "n": len(y), "none": None, "name": "x"}, [float(y.sum())]),
        lambda y: SimpleNamespace(logits=y),
        lambda y: y * 0 + 5,
        lambda y: y / 0,
        lambda y: y * torch.where(y > 0, math.nan, 1.0),
        lambda y: y > 0,
        lambda y: torch.complex(y, y),
        lambda y: y[:0],
        lambda y: F.dropout(y, 0.5, True),
        lambda y: y + torch.rand(5),
        lambda y: None,
        lambda y: 2 * y.to_sparse(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_output(after: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    def run_after(y: Tensor) -> Any:
        return after(y.float() if isinstance(y, Tensor) else y)

    model = Deep(run_after if dtype == torch.bfloat16 else after).to(dtype)
    folding = fold(model, images(dtype))
    assert len(folding.folded) in (0, 6)  # float(y.sum()) cannot be traced as a whole


def test_outputs_that_overflow_in_half_precision() -> None:
    model = Deep(lambda y: y * 60000).half()
    x = images(torch.float16)
    assert not bool(model(x).isfinite().all())
    assert len(fold(model, x).folded) == 6


class Off(nn.Module):
    """A linear layer, and an error that stands for that of a folded model."""

    def __init__(self, error: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.error = nn.Linear(4, 4), error

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.error


def test_how_much_worse_rounding_may_be() -> None:
    x, asked = torch.randn(64, 4).half(), []

    def check(error: float, dtype: torch.dtype = torch.float16) -> None:
        model = Off(0).to(dtype)
        check_outputs(model, Off(error).to(dtype), (x.to(dtype),), nn.ReLU, lambda *double: asked.append(double))

    check(0)
    assert not asked
    check(0.005)  # a few roundings
    ((double, (argument,)),) = asked
    assert double.layer.weight.dtype == argument.dtype == torch.float64
    for error in (0.1, math.nan):
        with pytest.raises(
            ValueError, match=r"^in float16 .* is off by .*, and the model's by 0\.00.*: fold the model in float32"
        ):
            check(error)
    with pytest.raises(ValueError, match="in float32"):
        check(0.005, torch.float32)
    with pytest.raises(ValueError, match="does what its graph does not show"):
        check(0.005, torch.float64)  # where rounding explains nothing


def test_the_measure() -> None:
    right = torch.tensor([1.0, 2.0, 3.0, math.inf])
    assert _off(right, right) == 0
    assert _off(torch.tensor([1.0, 2.0, 3.0, math.nan]), right) == math.inf
    assert _off(torch.tensor([1.0, 2.0, math.nan, math.inf]), right) == math.inf
    assert (
        _off(torch.tensor([1.0, 2.0, math.nan, math.inf]), right, where=torch.tensor([1, 2, math.nan, 1.0])) == math.inf
    )
    assert _off(right[:3] + 0.5, right[:3]) == pytest.approx(0.5 / math.sqrt(2 / 3))
    assert _off(torch.full((3,), 5.5), torch.full((3,), 5.0)) == pytest.approx(0.1)  # constant outputs: of their size
    assert _off(torch.zeros(3), torch.zeros(3)) == 0
    assert _off(torch.tensor([1, 2]), torch.tensor([1, 3])) == 0.5
    assert _off(torch.zeros(2), torch.zeros(3)) == math.inf
    assert _off(torch.zeros(0), torch.zeros(0)) == 0


def test_the_tensors_of_an_output() -> None:
    output = SimpleNamespace(a=torch.ones(1), b={"c": (torch.zeros(2), 3, True)}, d="text")
    output.output = output  # which ends
    assert [tuple(tensor.shape) for tensor in _tensors(output)][:4] == [(1,), (2,), (), ()]


def test_a_run_changes_nothing() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5)).train()
    x = torch.full((64,), -1.0)
    state = torch.random.get_rng_state()
    assert torch.equal(run(model, (x,)), run(model, (x,)))
    assert torch.equal(torch.random.get_rng_state(), state) and bool((x == -1).all())
