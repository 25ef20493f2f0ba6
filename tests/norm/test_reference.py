import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bnlab.norm import reference

EPS = 1e-5
SHAPES = pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (2, 3, 3, 2), (2, 3, 2, 2, 2)], ids=str)


def example(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, gamma, beta and the loss's gradient with respect to y."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64) * 2 + 1
    gamma, beta = torch.rand(shape[1], dtype=torch.float64) + 0.5, torch.randn(shape[1], dtype=torch.float64)
    return x, gamma, beta, torch.randn(shape, dtype=torch.float64)


class ByHand(torch.autograd.Function):
    """Algorithm 1 forward, the gradients of sec. 3 backward."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, beta: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, gamma)
        ctx.eps = eps
        return reference.transform(x, gamma, beta, eps).y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma = ctx.saved_tensors
        return *reference.gradients(dy, x, gamma, ctx.eps), None


@SHAPES
def test_the_gradients_of_the_paper_are_those_of_algorithm_1(shape: tuple[int, ...]) -> None:
    x, gamma, beta, _ = example(shape)
    assert torch.autograd.gradcheck(ByHand.apply, [t.requires_grad_() for t in (x, gamma, beta)] + [EPS])


@SHAPES
def test_autograd_of_algorithm_1_finds_the_gradients_of_the_paper(shape: tuple[int, ...]) -> None:
    x, gamma, beta, dy = example(shape)
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]
    found = torch.autograd.grad(reference.transform(x, gamma, beta, EPS).y, leaves, dy)
    for one, other in zip(found, reference.gradients(dy, x, gamma, EPS), strict=True):
        assert (one - other).abs().max() < 1e-12


@SHAPES
def test_training_is_torchs(shape: tuple[int, ...]) -> None:
    x, gamma, beta, dy = example(shape)
    leaves = [t.requires_grad_() for t in (x, gamma, beta)]
    y = F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    assert (reference.transform(x, gamma, beta, EPS).y - y).abs().max() < 1e-12
    for one, other in zip(torch.autograd.grad(y, leaves, dy), reference.gradients(dy, x, gamma, EPS), strict=True):
        assert (one - other).abs().max() < 1e-12


def test_known_answer() -> None:
    """Values 1 and 3: mean 2, biased variance 1; with eps 3 the standard deviation is 2."""
    forward = reference.transform(torch.tensor([[1.0], [3.0]]), torch.tensor([4.0]), torch.tensor([0.5]), 3.0)
    assert (forward.mean.item(), forward.var.item()) == (2, 1)
    assert forward.x_hat.tolist() == [[-0.5], [0.5]]
    assert forward.y.tolist() == [[-1.5], [2.5]]
    assert forward.y.dtype == torch.float64
    assert reference.population([torch.tensor([[1.0], [3.0]])]).var.item() == 2
    y = reference.inference(*(torch.tensor([v]) for v in ([3.0], 4.0, 0.5, 1.0, 1.0)), 3.0)
    assert y.tolist() == [[4.5]]


@SHAPES
def test_inference_is_torchs(shape: tuple[int, ...]) -> None:
    x, gamma, beta, _ = example(shape)
    mean, var = torch.randn(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64) + 0.1
    y = F.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS)
    assert (reference.inference(x, gamma, beta, mean, var, EPS) - y).abs().max() < 1e-12


@SHAPES
def test_population_is_torchs_cumulative_average_over_equal_batches(shape: tuple[int, ...]) -> None:
    batches = [example(shape)[0] * (i + 1) + i for i in range(5)]
    bn = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)[max(0, len(shape) - 3)](3, momentum=None)
    bn.double()
    for batch in batches:
        bn(batch)
    found = reference.population(batches)
    assert (found.mean - bn.running_mean).abs().max() < 1e-12
    assert (found.var / bn.running_var - 1).abs().max() < 1e-12


def test_population_refuses_batches_of_several_sizes() -> None:
    with pytest.raises(ValueError, match=r"batches of one size, not \[6, 12\] values"):
        reference.population([torch.zeros(4, 2, 3), torch.zeros(2, 2, 3), torch.zeros(4, 2, 3)])
