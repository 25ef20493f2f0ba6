import pytest
import torch
from torch import nn

from bnlab.norm import BatchNorm1d, Whitening1d, accumulate


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_old_statistics_weigh_as_much_as_after_one_batch(steps: int) -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, many = nn.BatchNorm1d(3, momentum=0.3).double(), nn.BatchNorm1d(3, momentum=0.3).double()
    one(x)
    with accumulate(many, steps):
        for _ in range(steps):
            many(x)  # the same each time, so that only weights can differ
    torch.testing.assert_close(many.running_mean, one.running_mean)
    torch.testing.assert_close(many.running_var, one.running_var)
    assert many.momentum == 0.3


def test_momenta_are_restored_after_an_error() -> None:
    model = nn.Sequential(BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None), Whitening1d(2, momentum=0.2))
    with pytest.raises(KeyboardInterrupt), accumulate(model, 4):
        assert model[0].momentum == pytest.approx(1 - 0.9**0.25)
        assert model[1].momentum is None
        assert model[2].momentum == pytest.approx(1 - 0.8**0.25)
        raise KeyboardInterrupt
    assert [layer.momentum for layer in model] == [0.1, None, 0.2]


def test_refusal() -> None:
    with (
        pytest.raises(ValueError, match=r"steps .* at least 1, not 0"),
        accumulate(nn.Identity(), 0),
    ):
        pass
