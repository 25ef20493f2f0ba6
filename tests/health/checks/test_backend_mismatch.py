import pytest
import torch
from torch import Tensor, nn

from bnlab import health
from bnlab.errors import UsageError
from tests.health.checks.networks import sound_network, teacher_batches


class DependsOnLayout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_contiguous() else x + 1


class NeedsFloat32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            raise TypeError("only float32")
        return x


def network(*middle: nn.Module, bias: float = 0.0) -> nn.Sequential:
    """Its normalisation gets values around a mean, with a standard deviation of 1."""
    torch.manual_seed(0)
    conv, bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
    nn.init.constant_(conv.bias, bias)  # type: ignore[arg-type]
    bn.running_mean.fill_(bias)  # type: ignore[union-attr]
    return nn.Sequential(*middle, conv, bn, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3)).eval()


IMAGES = torch.randn(16, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_finds_code_that_depends_on_memory_layout() -> None:
    report = health.diagnose(network(DependsOnLayout()), [IMAGES], backends=["channels_last"])
    found = report["BN020"]
    assert (found.severity, found.layers) == ("error", ("2",))
    assert found.numbers["backend"] == "channels_last"
    assert found.numbers["difference"] > 0.1 > found.numbers["tolerance"]


def test_finds_values_that_half_precision_does_not_hold() -> None:
    """bfloat16 has 8 bits: at 1000 it knows multiples of 4, so that nothing is left of a deviation of 1."""
    found = health.diagnose(network(bias=1000), [IMAGES])["BN020"]
    assert (found.severity, found.layers) == ("warn", ("1",))
    assert found.numbers["backend"] == "bfloat16"
    assert found.numbers["difference"] > max(0.25, found.numbers["tolerance"])
    assert found.numbers["changed"] > 0


def test_is_silent_where_rounding_the_images_explains_it() -> None:
    model = network()
    model[1].running_mean = model[0](IMAGES + 1000).detach().mean((0, 2, 3))
    report = health.diagnose(model, [IMAGES + 1000], backends=["bfloat16"])
    (parity,) = report.evidence.parts["backends"]
    assert parity.difference > 0.25
    assert parity.changed > 0
    assert "BN020" not in report


def test_finds_values_that_overflow_float16() -> None:
    model = network(bias=1e5)
    found = health.diagnose(model, [IMAGES], backends=["float16"])["BN020"]
    assert (found.severity, found.layers) == ("error", ("1",))
    assert "not finite" in found.message


def test_is_silent_on_sound_networks() -> None:
    model = sound_network()
    report = health.diagnose(
        model, teacher_batches(model), backends=("channels_last", "bfloat16", "float16", "trace", "script")
    )
    assert "BN020" not in report
    found = {parity.way: parity for parity in report.evidence.parts["backends"]}
    assert [*found] == ["channels_last", "bfloat16", "float16", "trace", "script"]
    assert found["channels_last"].difference < 1e-4 < found["bfloat16"].difference
    assert "BN020" not in health.diagnose(network(bias=1), [IMAGES])


def test_a_backend_that_does_not_run_is_a_note() -> None:
    report = health.diagnose(network(NeedsFloat32()), [IMAGES])
    assert "BN020" not in report
    assert [parity.way for parity in report.evidence.parts["backends"]] == ["channels_last"]
    assert any("bfloat16 was not checked" in note and "TypeError" in note for note in report.notes)


def test_other_inputs_than_images_have_no_channels_last() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).eval()
    report = health.diagnose(model, [torch.randn(16, 4)] * 2, backends=["channels_last"])
    assert "BN020" in report.skipped
    assert not report.notes


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'bfloat16'"):
        health.diagnose(network(), [IMAGES], backends=["bfloat"])
    with pytest.raises(UsageError, match="one name"):
        health.diagnose(network(), [IMAGES], backends="trace")
