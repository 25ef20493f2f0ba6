import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bnlab.norm import GhostBatchNorm1d, GhostBatchNorm2d, TooFewValuesError, reference


def batch(count: int, generator: int = 0) -> Tensor:
    noise = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(generator), dtype=torch.float64)
    return noise + torch.arange(count)[:, None, None, None]


@settings(max_examples=25)
@given(st.integers(1, 20), st.integers(1, 25), st.booleans())
@example(13, 4, True)
def test_each_part_is_normalised_by_itself(count: int, size: int, channels_last: bool) -> None:
    bn = GhostBatchNorm2d(3, ghost_size=size).double()
    nn.init.normal_(bn.weight, generator=torch.Generator().manual_seed(1))
    x = batch(count).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    x.requires_grad_()
    y = bn(x)
    parts = x.tensor_split(-(-count // size))
    assert max(len(part) for part in parts) <= size
    assert max(len(part) for part in parts) - min(len(part) for part in parts) <= 1
    expected = torch.cat([reference.transform(part, bn.weight, bn.bias, bn.eps).y for part in parts])
    torch.testing.assert_close(y, expected)
    assert not channels_last or y.is_contiguous(memory_format=torch.channels_last)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = torch.autograd.grad(y, [x, bn.weight], dy, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [x, bn.weight], dy))


def test_running_statistics_are_those_of_the_complete_batch() -> None:
    ghost, plain = GhostBatchNorm2d(3, ghost_size=4).double(), nn.BatchNorm2d(3).double()
    for seed in range(3):
        ghost(batch(11, seed)), plain(batch(11, seed))
    for name, value in plain.named_buffers():
        torch.testing.assert_close(ghost.get_buffer(name), value)
    x = batch(5)
    torch.testing.assert_close(ghost.eval()(x), plain.eval()(x))
    assert ghost.state_dict().keys() == plain.state_dict().keys()


def test_a_batch_that_fits_is_plain_batch_normalisation() -> None:
    ghost, plain = GhostBatchNorm1d(3, ghost_size=8), nn.BatchNorm1d(3)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ghost(x), plain(x))
    assert torch.equal(ghost(x, relu=True), plain(x).relu())


def test_relu() -> None:
    x = batch(10)
    one, other = (GhostBatchNorm2d(3, ghost_size=4).double() for _ in range(2))
    assert torch.equal(one(x, relu=True), other(x).relu())
    assert torch.equal(one.running_var, other.running_var)


def test_a_part_that_is_not_finite_does_not_move_the_running_statistics() -> None:
    bn = GhostBatchNorm2d(3, ghost_size=4).double()
    x = batch(8)
    x[0] = torch.nan
    y = bn(x)
    assert y[:4].isnan().all() and y[4:].isfinite().all()
    assert bn.running_mean.tolist() == [0, 0, 0] and int(bn.num_batches_tracked) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"ghost_size .* at least 1, not 0"):
        GhostBatchNorm2d(3, ghost_size=0)
    network = nn.Sequential(GhostBatchNorm1d(3, ghost_size=1))
    message = (
        r"^Expected more than 1 value per channel when training, .*\[1, 3\].* at 0 \(GhostBatchNorm1d\): .*ghost_size"
    )
    with pytest.raises(TooFewValuesError, match=message):
        network(torch.zeros(4, 3))
    assert "ghost_size=1" in repr(network)


def test_the_gradient_has_the_memory_format_of_the_batch() -> None:
    """A gradient in another memory format would make the convolution before the layer copy it."""
    x = batch(6).contiguous(memory_format=torch.channels_last).requires_grad_()
    layer = GhostBatchNorm2d(x.shape[1], ghost_size=4).to(x.dtype)
    (gradient,) = torch.autograd.grad(layer(x).sin().sum(), x)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
