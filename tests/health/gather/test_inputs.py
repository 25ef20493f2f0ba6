import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from bnlab.health.statistics import shift_of
from tests.health.checks.photos import batches, normalised, photos, trained_on

SELECT = ["BN112", "BN113", "BN026"]


def test_nothing_is_tried_where_the_statistics_fit() -> None:
    report = health.diagnose(
        trained_on(normalised(photos(256))), batches(normalised(photos(128, seed=1))), select=SELECT
    )
    parts = report.evidence.parts
    for part in ("preprocessing", "resolution", "eps"):
        assert parts[part].others == () and parts[part].present.distance < 0.1
    assert "colours" not in parts


def test_colours_follow_from_the_running_means_of_an_affine_layer() -> None:
    """Black and white swapped: the mean colour m becomes 1 - m."""
    network = trained_on(photos(256))
    own = 1 - photos(128, seed=1)
    found = health.diagnose(network, batches(own), select=SELECT).evidence.parts["colours"]
    assert found.trained == pytest.approx(photos(256).mean((0, 2, 3)).tolist(), abs=0.01)
    assert found.present == pytest.approx(own.mean((0, 2, 3)).tolist(), abs=0.01)
    assert found.unexplained < 0.01


def test_colours_are_not_measured_where_the_first_layer_is_not_affine_in_them() -> None:
    inner = trained_on(photos(256).square())

    class Squared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.inner(x.square()))

    report = health.diagnose(Squared().eval(), batches(1 - photos(128, seed=1)), select=SELECT)
    assert "colours" not in report.evidence.parts and "preprocessing" in report.evidence.parts


def test_a_network_that_takes_one_size_is_measured_up_to_its_last_layer() -> None:
    body = trained_on(normalised(photos(256)))[:-3]
    network = nn.Sequential(*body, nn.Flatten(), nn.Linear(24 * 8 * 8, 10)).eval()
    report = health.diagnose(network, batches(photos(64, seed=1)), select=SELECT)
    assert len(report.evidence.parts["resolution"].others) == 4 and not report.notes


def test_everything_is_restored_and_measured_from_the_same_images() -> None:
    network = trained_on(normalised(photos(256)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    hooks = [len(m._forward_pre_hooks) for m in network.modules()]
    report = health.diagnose(network, batches(photos(64, seed=1)), select=SELECT)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [len(m._forward_pre_hooks) for m in network.modules()] == hooks
    first = report.evidence.layers["1"]
    assert report.evidence.parts["preprocessing"].present.distance == pytest.approx(shift_of(first), rel=1e-4)


def test_a_failure_is_noted() -> None:
    """A network that takes no pixels above 1 works as it is; the changed images do not."""
    inner = trained_on(normalised(photos(256)))

    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 1:
                raise ArithmeticError("too bright")
            return torch.as_tensor(self.inner(x))

    report = health.diagnose(Strict().eval(), batches(photos(64, seed=1)), select=SELECT)
    assert any("ArithmeticError" in note for note in report.notes)
    assert "preprocessing" not in report.evidence.parts
