"""Images with the statistics of photos, and a network whose statistics are those of such images."""

import torch
from torch import Tensor, nn

from bnlab import norm

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def photos(
    n: int, size: int = 32, seed: int = 0, colour: tuple[float, ...] = (0.52, 0.46, 0.36), power: float = 1
) -> Tensor:
    """Pixels from 0 to 1, N x 3 x size x size: noise with a spectrum of 1/f^power, grey more than coloured."""
    random = torch.Generator().manual_seed(seed)
    f = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None])
    f[0, 0] = 1 / size

    def noise() -> Tensor:
        spectrum = torch.fft.rfft2(torch.randn(n, 3, size, size, generator=random)) / f**power
        x = torch.fft.irfft2(spectrum, (size, size))
        return x / x.std()

    brightness = noise()[:, :1] + 0.5 * torch.randn(n, 1, 1, 1, generator=random)
    tint = noise() * torch.tensor([0.08, 0.03, 0.12]).view(3, 1, 1)
    return (torch.tensor(colour).view(3, 1, 1) + 0.18 * brightness + tint).clamp(0, 1)


def normalised(pixels: Tensor) -> Tensor:
    return (pixels - MEAN) / STD


def small_network(seed: int = 0, width: int = 24, layers: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    parts: list[nn.Module] = []
    channels = 3
    for i in range(layers):
        conv = nn.Conv2d(channels, width, 3, stride=2 if i < 2 else 1, padding=1, bias=False)
        bn = nn.BatchNorm2d(width)
        nn.init.uniform_(bn.weight, 0.5, 1.5)
        nn.init.normal_(bn.bias, std=0.3)
        parts += [conv, bn, nn.ReLU()]
        channels = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)).eval()


def trained_on(images: Tensor, seed: int = 0, width: int = 24, layers: int = 4) -> nn.Sequential:
    """A network whose running statistics are those of the images."""
    network = small_network(seed, width, layers)
    norm.recalibrate(network, list(images.split(64)))
    head = network[-1]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():  # so that it gives several classes
        head.bias -= network(images).mean(0)
    return network


def batches(images: Tensor, size: int = 32) -> list[Tensor]:
    return list(images.split(size))


def with_teacher(network: nn.Module, images: Tensor, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Batches with the classes that the network itself gives them, as it is now."""
    with torch.no_grad():
        return [(x, network(x).argmax(1)) for x in images.split(size)]
