"""Validation accuracy jumps up and down from epoch to epoch after a port from TensorFlow, while the loss falls.

The story: pytorch/vision#8250 reports a network whose layers got momentum=0.99 from the original, which is in
TensorFlow; pytorch/examples#289 asks why the two defaults, 0.1 and 0.99, are so far apart. Here a network is trained
with 0.99, and the last batch of an epoch is a short one of 8 images.

The cause: PyTorch's momentum is the weight of the new batch, and TensorFlow's is the weight of the old statistics. So
0.99 means that evaluation normalises by the statistics of the last batch alone, whichever images are in it.

What to do: pass 1 - 0.99 = 0.01 to PyTorch, and measure the statistics of the trained network anew.
"""

from copy import deepcopy

from torch import nn

from bnlab import health
from shapes import Batches, in_batches, is_correct, make_images, make_network, tell, tell_change, train


def by_last_batch(model: nn.Module, last: Batches, val_batches: Batches) -> list[float]:
    """Accuracy after one more forward in training mode, for each batch alone; the weights stay as they are."""
    scores = []
    for images, _ in last:
        copy = deepcopy(model).train()
        copy(images)
        scores.append(is_correct(copy, val_batches).mean().item())
    return scores


def main() -> dict[str, object]:
    train_batches, val_batches = in_batches(*make_images(1000, seed=1)), in_batches(*make_images(512, seed=2))
    model = make_network(momentum=0.99)
    train(model, train_batches, epochs=3)

    report = health.diagnose(model, val_batches)
    found = tell(report, ["BN006", "BN102"])
    scores = by_last_batch(model, in_batches(*make_images(128, seed=3), size=8), val_batches)
    usual = sum(scores) / len(scores)
    print(f"By the same weights after 16 other last batches: {min(scores):.1%} to {max(scores):.1%}, mean {usual:.1%}.")
    repairs = [health.repairs.set_momentum(0.01), health.repairs.recalibrate()]
    repaired = health.repair(model, val_batches, repairs, calibration=train_batches)
    assert repaired.comparison is not None
    tell_change(repaired.comparison, "Momentum 0.01, and statistics measured anew on the training images")
    print("The cause: 0.99 is TensorFlow's weight of the old statistics, and PyTorch takes it for that of a new batch.")
    return {"found": found, "before": usual, "after": repaired.comparison.after}


if __name__ == "__main__":
    main()
