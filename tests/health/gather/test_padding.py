"""How the caller's mask is read."""

import pytest
import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.health import Report, diagnose


class Pooled(nn.Module):
    """A layer for all 12 positions, and one for 6."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.avg_pool1d(self.first(x), 2))
        return y


def diagnosed(mask: object) -> Report:
    torch.manual_seed(0)
    return diagnose(Pooled().eval(), [torch.randn(8, 3, 12) for _ in range(4)], padding=mask)  # type: ignore[arg-type]


def test_the_mask_counts_at_layers_of_its_length() -> None:
    def mask(x: Tensor) -> Tensor:
        return (torch.arange(12) >= 9).expand(8, 12)

    found = diagnosed(mask).evidence.parts["padding"]
    assert found.share == 0.25
    assert set(found.layers) == {"first"}
    x = torch.cat(
        [
            torch.randn(8, 3, 12, generator=generator)
            for generator in [torch.Generator().manual_seed(0)]
            for _ in range(4)
        ]
    )
    layer = found.layers["first"]
    torch.testing.assert_close(torch.from_numpy(layer.mean), x.mean((0, 2)).double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        torch.from_numpy(layer.variance_without),
        x[:, :, :9].transpose(0, 1).flatten(1).var(1).double(),
        rtol=1e-4,
        atol=1e-6,
    )
    distance = (x - x.mean((0, 2), keepdim=True)).square()
    for row, values in enumerate((x, distance)):
        apart = (values[:, :, 9:].mean(2) - values[:, :, :9].mean(2)).double()
        torch.testing.assert_close(torch.from_numpy(layer.difference[row]), apart.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.from_numpy(layer.error[row]), apart.std(0) / 32**0.5, rtol=1e-4, atol=1e-6)


def test_a_length_that_no_layer_has_is_noted() -> None:
    report = diagnosed(lambda x: torch.zeros(8, 13, dtype=torch.bool))
    assert "BN025" in report.skipped
    assert any("N x C x 13" in note for note in report.notes)


@pytest.mark.parametrize(
    "mask", [torch.zeros(8, 12), torch.zeros(8, dtype=torch.bool), torch.zeros(7, 12, dtype=torch.bool)],
    ids=["float", "1-d", "rows"],
)  # fmt: skip
def test_a_mask_that_does_not_fit_is_refused(mask: Tensor) -> None:
    with pytest.raises(UsageError, match=r"^padding= gave "):
        diagnosed(lambda x: mask)


def test_an_error_of_the_callers_function_is_noted() -> None:
    def failing(batch: object) -> object:
        raise KeyError("lengths")

    assert any("KeyError" in note for note in diagnosed(failing).notes)
