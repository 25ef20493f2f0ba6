"""Each use of a layer is measured."""

import numpy as np
import torch
from torch import Tensor, nn

from bnlab import health


class Twice(nn.Module):
    """Normalises the image, and the first half of its channels' doubles at fewer positions."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x).mean((2, 3)) + self.bn(2 * x[..., :2] + 1).mean((2, 3)))


def test_the_moments_of_each_use() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 4, 5, 5)
    first, second = health.diagnose(Twice().eval(), [x]).evidence.parts["uses"].layers["bn"]
    for use, values in ((first, x), (second, 2 * x[..., :2] + 1)):
        exact = values.double()
        np.testing.assert_allclose(use.mean, exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(use.variance, exact.var((0, 2, 3), correction=0), rtol=1e-6)
        np.testing.assert_allclose(use.image_means, exact.mean((2, 3)), rtol=1e-6, atol=1e-9)
        origin = x.double().mean((0, 2, 3))[:, None, None]
        np.testing.assert_allclose(use.image_squares, (exact - origin).square().mean((2, 3)), rtol=1e-6)


def test_nothing_is_run_without_such_a_layer() -> None:
    network = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(100, 3)).eval()
    assert "uses" not in health.diagnose(network, [torch.randn(8, 4, 5, 5)]).evidence.parts
