import pytest
import torch
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel

from bnlab import health, norm
from bnlab.health.report import Report
from tests.health.checks.networks import sound_network, teacher_batches


def pruned(amount: float) -> nn.Sequential:
    network = sound_network()
    prune.l1_unstructured(network[3], "weight", amount=amount)
    return network


def recalibrated(network: nn.Module) -> nn.Module:
    norm.recalibrate(network, [x for x, _ in teacher_batches(sound_network(), batches=32)])
    return network


def diagnosed(network: nn.Module) -> Report:
    """By labels that the network gives once it is recalibrated."""
    images = [x for x, _ in teacher_batches(sound_network(), batches=32)]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    recalibrated(network)
    with torch.no_grad():
        batches = [(x, network.eval()(x).argmax(1)) for x in images]
    network.load_state_dict(state)
    return health.diagnose(network, batches)


def test_finds_statistics_that_are_marked() -> None:
    network = sound_network()
    norm.convert(network)
    network[1].statistics = network[4].statistics = "population"
    network[4].num_batches_tracked.zero_()
    found = health.diagnose(network, teacher_batches(sound_network()))["BN027"]
    assert (found.severity, found.layers) == ("error", ("4",))
    assert network[4].statistics == "population"


def test_is_silent_on_population_statistics_that_are_measured() -> None:
    network = sound_network()
    norm.convert(network)
    network[1].statistics = network[4].statistics = "population"
    assert "BN027" not in health.diagnose(network, teacher_batches(network))


def test_finds_pruned_weights() -> None:
    found = diagnosed(pruned(0.75))["BN027"]
    assert (found.severity, found.layers) == ("warn", ("4",))
    assert found.numbers["changed"] == {"3": "pruned to 25% of the weights"}
    assert found.cost is not None
    assert found.cost.after == pytest.approx(1.0, abs=0.02)


def test_is_silent_on_pruned_weights_that_were_recalibrated() -> None:
    assert "BN027" not in diagnosed(recalibrated(pruned(0.75)))  # type: ignore[arg-type]
    assert "BN027" not in diagnosed(pruned(0.0))


def test_is_silent_where_it_costs_nothing() -> None:
    batches = teacher_batches(sound_network(), batches=32)
    report = health.diagnose(pruned(0.75), batches, metric=lambda output, batch: torch.ones(len(output)))
    assert "BN027" not in report
    assert "BN027" in health.diagnose(pruned(0.75), [x for x, _ in batches])


def test_is_silent_where_statistics_are_off_for_another_reason() -> None:
    network = sound_network()
    network[4].running_mean.add_(1)
    report = diagnosed(network)
    assert "BN102" in report
    assert "BN027" not in report


def test_finds_averaged_weights() -> None:
    averaged = AveragedModel(sound_network())
    averaged.update_parameters(sound_network())
    averaged.update_parameters(sound_network())
    with torch.no_grad():
        averaged.module[3].weight.mul_(3)
    found = diagnosed(averaged.eval())["BN027"]
    assert found.layers == ("module.4",)
    assert found.numbers["changed"] == {"": "averaged over 2 sets of weights"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fake_quantised_weights_are_seen() -> None:
    class Quantised(nn.Conv2d):
        def __init__(self, conv: nn.Conv2d) -> None:
            super().__init__(conv.in_channels, conv.out_channels, 3, bias=False)
            self.weight = conv.weight
            self.weight_fake_quant = FakeQuantize()
            self.weight_fake_quant.disable_observer()
            self.weight_fake_quant.scale.fill_(0.15)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv2d(x, self.weight_fake_quant(self.weight))

    network = sound_network()
    network[3] = Quantised(network[3]).eval()
    report = diagnosed(network)
    assert report.evidence.parts["outdated"].changed == {"3": "fake-quantised"}
    assert report["BN027"].layers == ("4",)
    network[3].weight_fake_quant.disable_fake_quant()
    assert diagnosed(network).evidence.parts["outdated"].changed == {}
