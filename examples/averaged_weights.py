"""The EMA (or SWA) model is much worse than the model that it averages, and sometimes no better than chance.

The story: facebookresearch/moco#70 asks why the average has the parameters and not the buffers, and finds it poor in
evaluation; mosaicml/composer#624 finds averaged models very poor whose statistics were not measured before validation.
Here torch's AveragedModel averages four sets of weights at a high learning rate, and copies the buffers.

The cause: layers of averaged weights put out other values than those of any of the weights that were averaged. The
running statistics were measured with the latter, so the averaged model normalises by those of another model.

What to do: measure the statistics of the averaged model on training images before each use, with this repair,
`bnlab.norm.recalibrate` or `torch.optim.swa_utils.update_bn`.
"""

from torch.optim.swa_utils import AveragedModel

from bnlab import health
from shapes import in_batches, make_images, make_network, tell, tell_change, train


def main() -> dict[str, object]:
    train_batches, val_batches = in_batches(*make_images(1024, seed=1)), in_batches(*make_images(512, seed=2))
    model = make_network()
    train(model, train_batches, epochs=2)
    averaged = AveragedModel(model)
    for _ in range(4):  # as SWA does it: a quarter of an epoch at a high learning rate, and then the average
        train(model, train_batches[:16], epochs=1, lr=0.2)
        averaged.update_parameters(model)

    report = health.diagnose(model, val_batches, averaged=averaged.eval())
    found = tell(report, ["BN017"])
    repaired = health.repair(averaged, val_batches, [health.repairs.recalibrate()], calibration=train_batches)
    assert repaired.comparison is not None
    tell_change(repaired.comparison, "The averaged model with statistics of its own")
    print("The cause: the weights were averaged, and the statistics remained those of the last weights.")
    return {"found": found, "before": repaired.comparison.before, "after": repaired.comparison.after}


if __name__ == "__main__":
    main()
