"""What shows that weights were changed."""

from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from bnlab import health
from tests.health.checks.networks import sound_network, teacher_batches


def changed(network: nn.Module) -> dict[str, str]:
    return dict(health.diagnose(network.eval(), teacher_batches(sound_network())).evidence.parts["outdated"].changed)


def test_pruned_modules() -> None:
    network = sound_network()
    prune.random_unstructured(network[0], "weight", amount=0.25)
    prune.identity(network[3], "weight")  # removes nothing
    assert changed(network) == {"0": "pruned to 75% of the weights"}
    prune.remove(network[0], "weight")  # leaves no trace
    assert changed(network) == {}


def test_averages_of_one_set_of_weights_changed_nothing() -> None:
    raw = sound_network()
    averaged = AveragedModel(raw)
    averaged.update_parameters(raw)
    assert changed(averaged) == {}
    averaged.update_parameters(raw)
    assert changed(averaged) == {"": "averaged over 2 sets of weights"}


def test_parametrisations_are_no_change() -> None:
    network = sound_network()
    parametrizations.weight_norm(network[0])
    assert changed(network) == {}
