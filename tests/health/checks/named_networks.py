"""Small networks whose layers have names, and batches, for the tests of the checks."""

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnlab.norm.recalibrate import recalibrate

Batch = tuple[Tensor, Tensor]


def small_network(
    seed: int = 0, *, bias: bool = False, norm: Callable[[int], nn.Module] = nn.BatchNorm2d
) -> nn.Sequential:
    """Two convolutions with norm and ReLU, and a head for 4 classes; with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(3, 8, 3, bias=bias),
        bn1=norm(8),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(8, 16, 3, bias=bias),
        bn2=norm(16),
        relu2=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        head=nn.Linear(16, 4),
    )
    return nn.Sequential(layers).eval()


def sound_network(seed: int = 0, *, bias: bool = False) -> nn.Sequential:
    """The small network with statistics of 512 images like those of `teacher_batches`."""
    network = small_network(seed, bias=bias)
    recalibrate(network, images(512, 32, seed=1000 + seed))
    return network


def images(n: int, batch: int, seed: int = 1) -> list[Tensor]:
    """Batches of random images, B x 3 x 8 x 8, that differ in brightness."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, 8, 8, generator=generator) + torch.randn(n, 3, 1, 1, generator=generator)
    return list(x.split(batch))


@torch.no_grad()
def teacher_batches(network: nn.Module, n: int = 256, batch: int = 32, seed: int = 1) -> list[Batch]:
    """Images whose labels are what the network says in evaluation."""
    network.eval()
    return [(x, network(x).argmax(1)) for x in images(n, batch, seed)]
