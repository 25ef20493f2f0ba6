import pytest
import torch
from torch import Tensor

from bnlab import norm
from bnlab.norm import weighing

SHAPES = pytest.mark.parametrize("shape", [(4, 3), (4, 3, 6), (4, 3, 5, 2), (2, 3, 2, 3, 2)], ids=str)
EPS = 1e-5


def example(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, mean, var, gamma, beta."""
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype) * 2 + 1
    return x, *(t.to(dtype) for t in (torch.randn(3), torch.rand(3) + 0.2, torch.rand(3) + 0.5, torch.randn(3)))


def by_the_paper(x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, weight: float) -> Tensor:
    """Summers & Dinneen, sec. 3.1: E[x] and E[x^2] are mixed, example by example, channel by channel."""
    y = torch.empty_like(x)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            own = x[n, c]
            first = (1 - weight) * mean[c] + weight * own.mean()
            second = (1 - weight) * (var[c] + mean[c] ** 2) + weight * own.square().mean()
            y[n, c] = gamma[c] * (own - first) / (second - first**2 + EPS).sqrt() + beta[c]
    return y


@SHAPES
@pytest.mark.parametrize("weight", [0.0, 0.03, 0.5, 1.0])
def test_it_is_the_papers_formula(shape: tuple[int, ...], weight: float) -> None:
    given = example(shape)
    if len(shape) == 2 and weight == 1:
        pytest.skip("one value, normalised by itself")
    y = weighing.normalise(*given, EPS, weight)
    assert (y - by_the_paper(*given, weight)).abs().max() < 1e-10


@SHAPES
def test_weight_0_is_plain_inference(shape: tuple[int, ...]) -> None:
    x, mean, var, gamma, beta = example(shape)
    plain = torch.nn.functional.batch_norm(x, mean, var, gamma, beta, training=False, eps=EPS)
    assert (weighing.normalise(x, mean, var, gamma, beta, EPS, 0.0) - plain).abs().max() < 1e-12


@SHAPES
def test_weight_1_is_the_examples_own_statistics(shape: tuple[int, ...]) -> None:
    x, mean, var, gamma, beta = example(shape)
    y = weighing.normalise(x, mean, var, gamma, beta, EPS, 1.0)
    if len(shape) == 2:
        assert torch.equal(y, beta.expand_as(x))
    else:
        plain = torch.nn.functional.instance_norm(x, weight=gamma, bias=beta, eps=EPS)
        assert (y - plain).abs().max() < 1e-10


def test_far_from_0_no_variance_is_lost() -> None:
    x, _, var, gamma, beta = example((4, 3, 50, 20))
    mean = torch.full((3,), 1e6, dtype=torch.float64)
    near = weighing.normalise(x, mean * 0, var, gamma, beta, EPS, 0.25)
    far = weighing.normalise(x + 1e6, mean, var, gamma, beta, EPS, 0.25)
    assert (near - far).abs().max() < 1e-7
    far = weighing.normalise(*(t.float() for t in (x.round() + 1e6, mean, var, gamma, beta)), EPS, 0.25)
    assert (weighing.normalise(x.round(), mean * 0, var, gamma, beta, EPS, 0.25) - far).abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_type_and_layout_are_kept(dtype: torch.dtype) -> None:
    x, *rest = example((4, 3, 6, 5), dtype)
    y = weighing.normalise(x.to(memory_format=torch.channels_last), *rest, EPS, 0.25)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = weighing.normalise(*(t.double() for t in (x, *rest)), EPS, 0.25)
    assert (y.double() - exact).abs().max() < 60 * torch.finfo(dtype).eps


def test_half_precision_with_float_parameters() -> None:
    x, *rest = example((4, 3, 6, 5), torch.float32)
    y = weighing.normalise(x.bfloat16(), *rest, EPS, 0.25)
    assert y.dtype == torch.bfloat16
    assert (y - weighing.normalise(x, *rest, EPS, 0.25)).abs().max() < 0.1


def test_without_gamma_and_beta() -> None:
    x, mean, var, _, _ = example((4, 3, 6))
    one, zero = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    plain = weighing.normalise(x, mean, var, None, None, EPS, 0.25)
    assert torch.equal(plain, weighing.normalise(x, mean, var, one, zero, EPS, 0.25))


@pytest.mark.parametrize("relu", [False, True])
def test_the_layers_inference_weighs(relu: bool) -> None:
    x, mean, var, gamma, beta = example((4, 3, 6, 5))
    layer = norm.BatchNorm2d(3, example_weight=0.25).double().eval()
    for name, value in {"running_mean": mean, "running_var": var, "weight": gamma, "bias": beta}.items():
        getattr(layer, name).data.copy_(value)
    expected = by_the_paper(x, mean, var, gamma, beta, 0.25)
    assert (layer(x, relu=relu) - (expected.relu() if relu else expected)).abs().max() < 1e-10
    plain = torch.nn.BatchNorm2d(3).double()
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.train()(x), plain(x))  # training does not


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(ValueError) as error:
        norm.BatchNorm2d(3, example_weight=weight)
    assert str(error.value) == f"example_weight is a share, 0 to 1, not {weight}"
    assert norm.BatchNorm2d(3, example_weight=1).example_weight == 1


def test_large_values_in_half_precision() -> None:
    x = (torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 300).half()
    layer = norm.BatchNorm2d(3, example_weight=0.1).eval()
    layer.running_var.fill_(9e4)
    torch.testing.assert_close(layer(x).float(), layer(x.float()), atol=0.01, rtol=0.01)
