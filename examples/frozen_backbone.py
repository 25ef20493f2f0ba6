"""I froze the backbone, and after the fine-tuning it gives other features than before.

The story: Lightning-AI/pytorch-lightning#15062 reports that a backbone which a callback has frozen still changes its
running mean and variance, and #15063 mends it. Here a network of one camera is frozen, and a second head is trained on
photos of another. The first head, whose weights no one touched, is measured before and after.

The cause: `requires_grad = False` stops the optimiser, but the running statistics are buffers, which each forward in
training mode moves. So the frozen weights get inputs normalised in another way than those that they were trained for.

What to do: freeze the statistics as well, before the fine-tuning: `bnlab.norm.freeze(model)`. It also survives the next
model.train(), which a layer that was set to evaluation does not.
"""

from copy import deepcopy

from torch import Tensor, nn

from bnlab import health, norm
from shapes import compare, in_batches, is_correct, make_images, make_network, tell, tell_change, train


def fine_tune(model: nn.Sequential, images: Tensor, labels: Tensor) -> nn.Sequential:
    """Train a new head on the frozen layers, in place; returns the network with it."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tuned = nn.Sequential(*model[:-1], nn.Linear(32, 6))
    train(tuned, in_batches(images, labels), epochs=1)
    return tuned


def main() -> dict[str, object]:
    model = make_network()
    train(model, in_batches(*make_images(1024, seed=1)))
    val_batches = in_batches(*make_images(512, seed=2))
    images, labels = make_images(1024, seed=3)
    new_images = images * 0.4 + 0.3  # another camera: less contrast

    protected = deepcopy(model)
    norm.freeze(protected)
    fine_tune(protected, new_images, labels)
    tuned = fine_tune(model, new_images, labels)
    found = tell(health.diagnose(tuned, in_batches(new_images[:512], labels[:512])), ["BN004"])

    comparison = compare(is_correct(model, val_batches), is_correct(protected, val_batches))
    tell_change(comparison, "The first head on the first photos, with norm.freeze before the fine-tuning")
    print("The cause: the weights are frozen, and the running statistics follow the new photos all the same.")
    return {"found": found, "before": comparison.before, "after": comparison.after}


if __name__ == "__main__":
    main()
