import pytest
import torch

from bnlab.lab.studies.covariate_shift.noisy_batch_norm import NoisyBatchNorm, other_noise
from bnlab.nets import build
from bnlab.norm import BatchNorm2d


@pytest.mark.parametrize("relu", [False, True])
def test_noise_moves_each_channel_of_each_step_and_each_value_a_little(relu: bool) -> None:
    layer = NoisyBatchNorm(200)
    images = torch.randn(64, 200, 4, 4)
    torch.manual_seed(1)
    first = layer(images)
    second = layer(images)
    plain = BatchNorm2d(200)(images)
    residual = (first - plain).detach()
    means = residual.mean((0, 2, 3))  # 200
    assert -0.55 < means.min() < -0.4
    assert 0.4 < means.max() < 0.55
    scales = (first * plain).mean((0, 2, 3)) / plain.square().mean((0, 2, 3))
    assert 0.98 < scales.min() < 1.02
    assert 1.23 < scales.max() < 1.27
    within = first - means[:, None, None] - scales[:, None, None] * plain
    expected = (0.1**2 / 3 + 0.1**2) ** 0.5  # of a uniform of half-width 0.1, and of 0.1 times a normal y
    assert within.std().item() == pytest.approx(expected, rel=0.05)
    assert not torch.allclose(first.mean((0, 2, 3)), second.mean((0, 2, 3)), atol=0.1)
    torch.manual_seed(1)
    assert torch.equal(layer(images, relu=relu), first.relu() if relu else first)


def test_noise_is_drawn_anew_in_the_layers_before_alone() -> None:
    first, second = NoisyBatchNorm(4), NoisyBatchNorm(4)
    images, seen = torch.randn(8, 4, 2, 2), []
    for first.other, second.other in ((False, False), (True, False), (False, False)):
        torch.manual_seed(1)
        seen.append((first(images).detach(), second(images).detach()))
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[0][0], seen[2][0])


def test_noise_before_a_layer_is_put_back_as_it_was() -> None:
    network = build("bn_mlp", classes=3, norm=NoisyBatchNorm)
    noisy = [layer for layer in network.modules() if isinstance(layer, NoisyBatchNorm)]
    with other_noise(network, {"hidden1"}):
        assert [layer.other for layer in noisy] == [True, False, False]
    assert not any(layer.other for layer in noisy)


def test_inference_has_no_noise() -> None:
    layer = NoisyBatchNorm(3)
    images = torch.randn(8, 3, 2, 2)
    layer(images)
    plain = BatchNorm2d(3)
    plain.load_state_dict(layer.state_dict())
    assert torch.equal(layer.eval()(images), plain.eval()(images))
    layer.statistics = "batch"
    assert torch.equal(layer(images), plain.train()(images))
