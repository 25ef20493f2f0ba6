"""The optimiser: which parameters it trains, at which learning rates, and which of them decay."""

import torch

from bnlab.nets.network import TableNetwork
from bnlab.recipe import Recipe


def make_optimizer(network: TableNetwork, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam, or AdamW (Loshchilov & Hutter 2019).

    Weight decay applies to matrices and filters, not to gamma, beta and biases. The learning rate of the backbone has
    the factor `backbone_lr_factor`; the last layer and the auxiliary heads have the factor 1.
    """
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    slow = {name for name in trained if name.split(".")[0] in network.order and recipe.backbone_lr_factor != 1}
    by_factor = [(1.0, [p for name, p in trained.items() if name not in slow])]
    if slow:
        by_factor.insert(0, (recipe.backbone_lr_factor, [p for name, p in trained.items() if name in slow]))
    groups = [
        {"params": [p for p in parameters if (p.ndim > 1) == is_matrix], "weight_decay": decay, "factor": factor}
        for factor, parameters in by_factor
        for decay, is_matrix in ((recipe.weight_decay, True), (0.0, False))
    ]
    fused = {p.device.type for p in network.parameters()} <= {"cpu", "cuda"}  # one pass over the weights
    if recipe.optimizer != "sgd":
        kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
        return kind(groups, lr=recipe.learning_rate, fused=fused)
    return torch.optim.SGD(
        groups, lr=recipe.learning_rate, momentum=recipe.momentum, nesterov=recipe.momentum > 0, fused=fused
    )


def clip_gradients(optimizer: torch.optim.Optimizer, norm: float) -> None:
    """Scale the gradients of all parameters together down to this norm, if theirs is larger (Pascanu et al. 2013)."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give each group of parameters the rate times its factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]
