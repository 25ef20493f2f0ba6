import pytest
import torch

from bnlab.nets import build
from bnlab.training.ema import EMA


def test_it_keeps_decay_of_itself_at_each_step() -> None:
    network = build("bn_small_inception", classes=3)
    ema = EMA(network, 0.9)
    first = network.fc.weight.detach().clone()
    with torch.no_grad():
        network.fc.weight.add_(1)
        network.conv1.bn.running_mean.add_(1)
        network.conv1.bn.num_batches_tracked.fill_(7)
    ema.update(network, 1000)
    assert torch.allclose(ema.network.fc.weight, first + 1 - 0.9**4, atol=1e-6)
    assert ema.network.conv1.bn.running_mean.mean().item() == pytest.approx(1 - 0.9**4)
    assert ema.network.conv1.bn.num_batches_tracked == 7
    before = ema.network.fc.weight.clone()
    ema.update(network, 1001)  # only each fourth step
    assert torch.equal(ema.network.fc.weight, before)
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_a_young_average_forgets_its_beginning() -> None:
    network = build("bn_small_inception", classes=3)
    ema = EMA(network, 0.999)
    first = network.fc.weight.detach().clone()
    with torch.no_grad():
        network.fc.weight.add_(1)
    for step in range(1, 101):
        ema.update(network, step)
    kept = (1 - (ema.network.fc.weight - first)).mean().item()
    assert kept < 1e-3
    ema.restart(build("bn_small_inception", classes=3))
    assert torch.equal(ema.network.fc.weight, first)
