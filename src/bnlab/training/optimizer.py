"""The optimiser: which parameters it moves, how fast, and which of them decay."""

from collections.abc import Iterator

import torch
from torch import nn

from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe


def make_optimizer(network: TableNetwork, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or Adam. Weight decay is for matrices and filters, not gamma, beta and biases."""
    groups = [
        {"params": chosen, "weight_decay": decay, "factor": factor}
        for factor, parameters in _by_factor(network, recipe.backbone_lr_factor)
        for decay, chosen in (
            (recipe.weight_decay, [p for p in parameters if p.ndim > 1]),
            (0.0, [p for p in parameters if p.ndim <= 1]),
        )
    ]
    fused = {parameter.device.type for parameter in network.parameters()} <= {
        "cpu",
        "cuda",
    }  # one pass over the weights
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.learning_rate, fused=fused)
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused
    )


def _by_factor(network: TableNetwork, backbone_lr_factor: float) -> Iterator[tuple[float, list[nn.Parameter]]]:
    """What is trained, by the factor on its learning rate: the backbone's, and 1 for the last layer and the heads."""
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    slow = {name for name in trained if name.split(".")[0] in network.order and backbone_lr_factor != 1}
    if slow:
        yield backbone_lr_factor, [p for name, p in trained.items() if name in slow]
    yield 1.0, [p for name, p in trained.items() if name not in slow]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set it for all parameters, each group's times its factor, and give it back."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)  # a state.pt from before there were factors has none
    return rate
