from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bnlab.norm import moments

cuts = st.lists(st.integers(1, 39), max_size=6).map(lambda at: [0, *sorted(set(at)), 40])


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance in float64, in two passes."""
    values = x.double().transpose(0, 1).flatten(1)  # C x values
    mean = values.mean(1)
    return mean, (values - mean[:, None]).square().mean(1)


@given(st.integers(0, 2**32 - 1), cuts, st.floats(-1e6, 1e6))
@settings(max_examples=40)
def test_merged_moments_are_those_of_all_values_together(seed: int, at: list[int], mean: float) -> None:
    x = torch.randn(40, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + mean
    x[:20] += 5  # so that the batches' means differ
    parts = [moments.measure(x[a:b]) for a, b in pairwise(at)]
    found, together = moments.merge(parts), moments.measure(x)
    assert found.count == together.count == 80
    assert (found.mean - exact(x)[0]).abs().max() <= 1e-12 * (1 + abs(mean))
    assert (found.variance(unbiased=False) / exact(x)[1] - 1).abs().max() < 1e-9
    assert (together.variance(unbiased=False) / exact(x)[1] - 1).abs().max() < 1e-9


@given(st.integers(0, 2**32 - 1), cuts)
@settings(max_examples=20)
def test_covariances_merge_too(seed: int, at: list[int]) -> None:
    x = torch.randn(40, 6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x[:15] += torch.arange(6.0)[:, None]
    found = moments.merge(moments.measure_covariance(x[a:b], 2) for a, b in pairwise(at))
    values = x.transpose(0, 1).flatten(1)  # 6 x 80
    for group in range(2):
        expected = torch.cov(values[3 * group : 3 * group + 3], correction=0)
        assert (found.variance(unbiased=False)[group] - expected).abs().max() < 1e-12
    assert (found.mean - values.mean(1)).abs().max() < 1e-12


def test_the_variance_is_biased_or_not() -> None:
    found = moments.measure(torch.tensor([[1.0], [3.0]]))
    assert (found.count, found.mean.item(), found.scatter.item()) == (2, 2, 2)
    assert found.variance(unbiased=False).item() == 1
    assert found.variance(unbiased=True).item() == 2
    assert torch.equal(found.variance(unbiased=True), torch.tensor([[1.0], [3.0]]).double().var(0))


def test_too_few_values_have_no_variance() -> None:
    one = moments.measure(torch.tensor([[1.0, 2.0]]))
    assert one.variance(unbiased=True).isnan().all()
    assert one.variance(unbiased=False).tolist() == [0, 0]
    nothing = moments.measure(torch.empty(0, 2))
    assert nothing.variance(unbiased=False).isnan().all()


def test_no_values_change_nothing() -> None:
    torch.manual_seed(0)
    together = moments.measure(torch.randn(4, 2, 3))
    for empty in (moments.measure(torch.empty(shape)) for shape in ((0, 2), (0, 2, 3), (4, 2, 0))):
        assert empty.count == 0
        merged = moments.merge([empty, together, empty])
        assert merged.count == 12
        assert torch.equal(merged.mean, together.mean)
        assert torch.equal(merged.scatter, together.scatter)
    empty = moments.measure_covariance(torch.empty(0, 4, 3), 2)
    assert (empty.count, empty.mean.shape, empty.scatter.shape) == (0, (4,), (2, 2, 2))
    nothing = moments.merge([moments.measure(torch.empty(0, 2))] * 2)
    assert (nothing.count, nothing.mean.tolist(), nothing.scatter.tolist()) == (0, [0, 0], [0, 0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("mean", "std"), [(3.0, 0.5), (150.0, 1.0)])
def test_moments_of_an_ordinary_batch(dtype: torch.dtype, layout: torch.memory_format, mean: float, std: float) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 40, 40) * std + mean).to(dtype, memory_format=layout)
    found = moments.measure(x)
    assert found.count == 8 * 1600
    assert found.mean.dtype == found.scatter.dtype == torch.float64
    assert (found.mean - exact(x)[0]).abs().max() < 1e-6 * (1 + mean)
    assert (found.variance(unbiased=False) / exact(x)[1] - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_moments_far_from_0(dtype: torch.dtype, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = (torch.randn(8, 3, 40, 40, dtype=torch.float64) * 0.1 + 1e6).to(dtype, memory_format=layout)
    found = moments.measure(x)
    assert (found.mean - exact(x)[0]).abs().max() < 1e-6
    assert (found.variance(unbiased=False) / exact(x)[1] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(64, 2, 128, 128), (1, 2, 1024, 1024)], ids=str)
def test_many_values_in_channels_last_order(shape: tuple[int, ...]) -> None:
    """torch's kernel sums them one by one in float32: of a million the variance is wrong in the fourth digit."""
    torch.manual_seed(0)
    x = (torch.randn(shape) + 30).to(memory_format=torch.channels_last)
    mean, var = exact(x)
    native = torch.batch_norm_update_stats(x, None, None, 0.0)
    assert (native[1] / var - 1).abs().max() > 1e-4  # once this fails, `measure` need not split them
    found = moments.measure(x)
    assert (found.mean - mean).abs().max() < 2e-5
    assert (found.variance(unbiased=False) / var - 1).abs().max() < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_give_moments_that_are_not(bad: float) -> None:
    x = torch.zeros(4, 2, 3)
    x[1, 1, 1] = bad
    found = moments.measure(x)
    assert not found.mean[1].isfinite()
    assert not found.variance(unbiased=False)[1].isfinite()


def test_measuring_adds_no_graph() -> None:
    x = torch.randn(4, 2, requires_grad=True)
    assert not moments.measure(x).mean.requires_grad
    assert not moments.measure_covariance(x, 1).scatter.requires_grad


def test_merged_statistics_are_those_of_all_values_by_weight() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 3, 2, dtype=torch.float64)
    x[:10] += 5
    parts = x[:10], x[10:]
    stacked = [torch.stack(values) for values in zip(*map(exact, parts), strict=True)]
    mean, variance = moments.merge_statistics(stacked[0], stacked[1], torch.tensor([1, 3]))
    torch.testing.assert_close((mean, variance), exact(x))
