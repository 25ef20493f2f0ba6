import pytest
import torch

from bnlab.nets import build
from bnlab.training.ema import EMA


def test_it_keeps_decay_to_the_power_of_the_steps_between_updates() -> None:
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
    ema.update(network, 1001)  # only each fourth step has an effect
    assert torch.equal(ema.network.fc.weight, before)
    assert not any(p.requires_grad for p in ema.network.parameters())


def test_a_young_average_forgets_the_initial_weights() -> None:
    network = build("bn_small_inception", classes=3)
    ema = EMA(network, 0.999)
    first = network.fc.weight.detach().clone()
    with torch.no_grad():
        network.fc.weight.add_(1)
    kept = []
    for step in range(1, 101):
        ema.update(network, step)
        kept.append((1 - (ema.network.fc.weight - first)).mean().item())
    assert kept[3] == pytest.approx((4 / 14) ** 4, abs=1e-6)  # TensorFlow's warm-up: n / (n + 10) a step
    assert kept[-1] < 1e-3
    ema.restart(build("bn_small_inception", classes=3))
    assert torch.equal(ema.network.fc.weight, first)


def test_the_average_is_not_the_trained_network() -> None:
    network = build("bn_small_inception", classes=3)
    ema = EMA(network, 0.9)
    with torch.no_grad():
        network.fc.weight.add_(1)
    assert not torch.equal(ema.network.fc.weight, network.fc.weight)
