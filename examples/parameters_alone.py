"""The model that I load gives other outputs than the one that I saved, although no weight differs.

The story: in huggingface/peft#1732 a network with batch normalisation does not give the same outputs once it is saved
and loaded, because the file holds what was trained, and not the buffers. Here the parameters alone are saved, and
loaded with strict=False, so that nothing complains.

The cause: running means and variances are buffers, not parameters. Those that a file lacks stay as they are in the new
network, mean 0 and variance 1.

What to do: save the whole state_dict() and load it with strict=True. If only the file without buffers is left, measure
the statistics anew on training images.
"""

from bnlab import health
from shapes import in_batches, make_images, make_network, tell, tell_change, train


def main() -> dict[str, object]:
    train_batches, val_batches = in_batches(*make_images(1024, seed=1)), in_batches(*make_images(512, seed=2))
    model = make_network()
    train(model, train_batches)
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    found = tell(health.diagnose(model, val_batches, checkpoint=saved), ["BN021"])

    loaded = make_network(seed=1).eval()
    print(f"Missing without a word: {len(loaded.load_state_dict(saved, strict=False).missing_keys)} tensors.")
    print(f"The outputs differ by up to {(loaded(val_batches[0][0]) - model(val_batches[0][0])).abs().max():.1f}.")
    repaired = health.repair(loaded, val_batches, [health.repairs.recalibrate()], calibration=train_batches)
    assert repaired.comparison is not None
    tell_change(repaired.comparison, "The loaded network with statistics measured anew on the training images")
    print("The cause: the file holds the parameters and not the buffers, and strict=False says nothing of it.")
    return {"found": found, "before": repaired.comparison.before, "after": repaired.comparison.after}


if __name__ == "__main__":
    main()
