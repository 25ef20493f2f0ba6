"""Small networks that the tests of checks have in common."""

import torch
from torch import Tensor, nn

from bnlab import norm

CLASSES = 4


def sound_network(seed: int = 0, *, dropout: float = 0.0) -> nn.Sequential:
    """A network in evaluation mode whose running statistics are those of standard normal images, 3 x 8 x 8."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, CLASSES)),
    )
    norm.recalibrate(network, [torch.randn(64, 3, 8, 8) for _ in range(4)])
    return network.eval()


def teacher_batches(network: nn.Module, batches: int = 2, size: int = 16, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Batches of standard normal images whose labels are the network's own answers."""
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(size, 3, 8, 8, generator=generator) for _ in range(batches)]
    with torch.no_grad():
        return [(x, network(x).argmax(1)) for x in images]
