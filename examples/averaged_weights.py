"""The EMA (or SWA) model is much worse than the model that it averages, and sometimes no better than chance.

The story: facebookresearch/moco#70 asks why the average has the parameters and not the buffers, and finds it poor in
evaluation; mosaicml/composer#624 finds averaged models very poor whose statistics were not measured before validation.
Here each step of the optimiser moves an average of the parameters, as is usual, and nothing moves its buffers.

The cause: the average is never run in training mode, so its running statistics are those it was copied with, mean 0 and
variance 1. Copies of the model's own buffers would be nearer, but those of other weights, too.

What to do: measure the statistics of the averaged model on training images before each use, with this repair,
`bnlab.norm.recalibrate` or `torch.optim.swa_utils.update_bn`.
"""

from copy import deepcopy

import torch
from torch import nn

from bnlab import health
from shapes import in_batches, make_images, make_network, tell, tell_change, train


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float = 0.9) -> None:
    for average, parameter in zip(averaged.parameters(), model.parameters(), strict=True):
        average.lerp_(parameter, 1 - decay)


def main() -> dict[str, object]:
    train_batches, val_batches = in_batches(*make_images(1024, seed=1)), in_batches(*make_images(512, seed=2))
    model = make_network()
    averaged = deepcopy(model).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    optimizer.register_step_post_hook(lambda *_: update_average(averaged, model))
    train(model, train_batches, optimizer=optimizer)

    report = health.diagnose(model, val_batches, averaged=averaged)
    found = tell(report, ["BN017"])
    repaired = health.repair(averaged, val_batches, [health.repairs.recalibrate()], calibration=train_batches)
    assert repaired.comparison is not None
    tell_change(repaired.comparison, "The averaged model with statistics of its own")
    print("The cause: the weights were averaged, and the statistics remained the initial ones.")
    return {"found": found, "before": repaired.comparison.before, "after": repaired.comparison.after}


if __name__ == "__main__":
    main()
