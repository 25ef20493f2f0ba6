import pytest
import torch

from bnlab.lab.studies.regularisation.renormalisation import Renormalisation
from bnlab.norm import BatchNorm1d, BatchNorm2d


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 2, 2)])
def test_renormalisation_gives_what_the_recorded_statistics_give(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = Renormalisation(3, momentum=0.25)
    torch.nn.init.uniform_(layer.weight)
    torch.nn.init.uniform_(layer.bias)
    layer(torch.randn(shape) * 3 + 1)
    inputs = torch.randn(shape)
    known = layer.eval()(inputs)
    assert torch.allclose(layer.train()(inputs), known, atol=1e-5)
    assert not torch.allclose(layer.eval()(inputs), known, atol=1e-2)  # the batch has been recorded since


@pytest.mark.parametrize("relu", [False, True])
def test_its_gradients_are_those_of_ioffes_formula(relu: bool) -> None:
    torch.manual_seed(0)
    layer = Renormalisation(3).double()
    layer.weight.data.uniform_(0.5, 2)
    layer(torch.randn(8, 3, dtype=torch.float64))
    mean, sd = layer.running_mean.clone(), (layer.running_var + layer.eps).sqrt()
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    towards = torch.randn(8, 3, dtype=torch.float64)

    batch_sd = (x.var(0, unbiased=False) + layer.eps).sqrt()
    r, d = (batch_sd / sd).detach(), ((x.mean(0) - mean) / sd).detach()
    y = ((x - x.mean(0)) / batch_sd * r + d) * layer.weight + layer.bias
    expected = torch.autograd.grad(((y.relu() if relu else y) * towards).sum(), [x, layer.weight, layer.bias])

    found = torch.autograd.grad((layer(x, relu=relu) * towards).sum(), [x, layer.weight, layer.bias])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    assert found[0].sum(0).abs().max() < 1e-6  # the batch's mean is a function of x: no shift of it has a gradient


def test_what_is_recorded_is_the_average_of_the_first_batches_then_a_moving_one() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(5, 2) for _ in range(3)]
    layer = Renormalisation(2, momentum=0.4)
    first = layer(batches[0])
    plain = BatchNorm1d(2)
    assert torch.equal(first, plain(batches[0]))
    layer(batches[1])
    assert torch.allclose(layer.running_mean, (batches[0].mean(0) + batches[1].mean(0)) / 2, atol=1e-6)
    before = layer.running_var.clone()
    layer(batches[2])
    assert torch.allclose(layer.running_var, 0.6 * before + 0.4 * batches[2].var(0), atol=1e-6)


def test_by_its_own_batch_in_evaluation_it_is_bn() -> None:
    torch.manual_seed(0)
    layer = Renormalisation(3)
    images = torch.randn(4, 3, 2, 2)
    layer(images * 5)
    layer.eval().statistics = "batch"
    before = layer.running_mean.clone()
    assert torch.equal(layer(images), BatchNorm2d(3).train()(images))
    assert torch.equal(layer.running_mean, before)
