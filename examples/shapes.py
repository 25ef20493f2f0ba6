"""Small images with classes that a network learns in a second, for the examples: smooth shapes in colour.

Every example makes its data and its network here, so that nothing has to be downloaded. Seeds are fixed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnlab import health

SIZE = 20
_COLOURS = torch.tensor([[0.95, 0.45, 0.15], [0.15, 0.45, 0.95]])  # orange and blue
_GROUND = torch.tensor([0.55, 0.42, 0.25])  # photos are warmer than grey on average

Batches = list[tuple[Tensor, Tensor]]


def make_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images N x 3 x 20 x 20 from 0 to 1, and their classes: disc, ring or bars, each in orange or in blue."""
    random = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, generator=random)

    labels = torch.randint(6, (n,), generator=random)
    shape, colour = (labels % 3)[:, None, None], labels // 3
    axis = torch.arange(SIZE) - (SIZE - 1) / 2
    y, x = axis[:, None] - uniform(-3, 3), axis - uniform(-3, 3)
    distance = (y**2 + x**2).sqrt() - uniform(4, 6)
    disc, ring = torch.sigmoid(-distance), torch.exp(-((distance / 1.2) ** 2))
    bars = torch.sigmoid(3 * torch.sin(x * uniform(1.0, 1.4) + uniform(0, 6))) * torch.sigmoid(-distance - 1)
    mask = torch.where(shape == 0, disc, torch.where(shape == 1, ring, bars))[:, None]  # N x 1 x 20 x 20
    ink = _COLOURS[colour] + 0.1 * torch.randn(n, 3, generator=random)
    ground = _GROUND + 0.1 * torch.randn(n, 3, generator=random)
    images = ground[:, :, None, None] * (1 - mask) + ink[:, :, None, None] * mask
    images = images * uniform(0.6, 1.2)[:, None] + 0.05 * torch.randn(images.shape, generator=random)  # light, noise
    return images.clamp(0, 1), labels


def in_batches(images: Tensor, labels: Tensor, size: int = 32) -> Batches:
    return list(zip(images.split(size), labels.split(size), strict=True))


def make_network(*, seed: int = 0, **norm: float) -> nn.Sequential:
    """Three convolutions with batch normalisation; `norm` is passed to the layers, such as momentum=0.01."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in ((3, 16), (16, 24), (24, 32)):
        layers += [nn.Conv2d(before, after, 3, 2, padding=1, bias=False), nn.BatchNorm2d(after, **norm), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(32, 6))


def train(
    model: nn.Module,
    batches: Batches,
    *,
    epochs: int = 3,
    lr: float = 0.05,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train all parameters that require a gradient, by SGD unless an optimiser is passed, and leave the model in
    evaluation mode. The learning rate falls to 1% in a line.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.SGD(trained, lr, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, epochs * len(batches))
    model.train()
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def is_correct(model: nn.Module, batches: Batches) -> Tensor:
    """Which images are classified correctly in evaluation mode: N, 0 or 1."""
    return torch.cat([(model.eval()(images).argmax(1) == labels).double() for images, labels in batches])


def compare(before: Tensor, after: Tensor) -> health.Comparison:
    """The accuracy of two ways on the same images, with the exact McNemar test."""
    return health.Comparison.measure(before.numpy(), after.numpy())


def tell(report: health.Report, ids: Sequence[str]) -> list[str]:
    """Print the accuracy in training and in evaluation mode, and findings; return the ids of those that there are."""
    batch, running = report.accuracy["batch"], report.accuracy["running"]
    if batch is not None and running is not None:
        print(f"Accuracy in training mode: {batch:.1%}, in evaluation mode: {running:.1%}.")
    for id in ids:
        if id in report:
            print(f"{report[id].severity}: {report[id]}.")
    return [finding.id for finding in report.findings]


def tell_change(comparison: health.Comparison, remedy: str) -> None:
    """Print what a remedy changes."""
    print(f"{remedy}: {comparison.before:.1%} before, {comparison.after:.1%} after (p = {comparison.p_value:.1g}).")
