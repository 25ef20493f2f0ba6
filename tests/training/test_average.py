import pytest
import torch

from bnlab.nets import build
from bnlab.training.average import Average


def test_it_keeps_decay_of_itself_at_each_step() -> None:
    network = build("bn_small_inception", classes=3)
    average = Average(network, 0.9)
    first = network.fc.weight.detach().clone()
    with torch.no_grad():
        network.fc.weight.add_(1)
        network.conv1.bn.running_mean.add_(1)
        network.conv1.bn.num_batches_tracked.fill_(7)
    average.update(network, 1000)
    assert torch.allclose(average.network.fc.weight, first + 1 - 0.9**4, atol=1e-6)
    assert average.network.conv1.bn.running_mean.mean().item() == pytest.approx(1 - 0.9**4)
    assert average.network.conv1.bn.num_batches_tracked == 7
    before = average.network.fc.weight.clone()
    average.update(network, 1001)  # only each fourth step
    assert torch.equal(average.network.fc.weight, before)
    assert not any(p.requires_grad for p in average.network.parameters())


def test_a_young_average_forgets_its_beginning() -> None:
    network = build("bn_small_inception", classes=3)
    average = Average(network, 0.999)
    first = network.fc.weight.detach().clone()
    with torch.no_grad():
        network.fc.weight.add_(1)
    for step in range(1, 101):
        average.update(network, step)
    kept = (1 - (average.network.fc.weight - first)).mean().item()
    assert kept < 1e-3
    average.begin(build("bn_small_inception", classes=3))
    assert torch.equal(average.network.fc.weight, first)
