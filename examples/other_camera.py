"""Accuracy is better without model.eval(), on photos of another place or camera than those of the training.

The story: in layumi/Person_reID_baseline_pytorch#218 the results are best when the network is left in training mode,
and worst for single images; dvl-tum/GHOST#4 describes the same effect put to use, batch statistics of the new videos.
Here the photos of a second camera are darker, flatter and bluer than those of the training.

The cause: the running statistics are those of the first camera. Batch statistics are those of the new images, which
takes away the difference in light and colour, but depends on which images come together.

What to do: pass training images as `reference`, by which the diagnosis tells another camera from statistics that lag
behind the weights. Then move the statistics towards those of new images: n images weigh n / (N + n). No labels are
needed. Here 256 images are used for that, and others to measure what it gives.
"""

from torch import Tensor, tensor

from bnlab import health
from shapes import in_batches, make_images, make_network, tell, tell_change, train


def second_camera(images: Tensor) -> Tensor:
    """Less light and contrast, and a blue cast: N x 3 x H x W from 0 to 1."""
    return images * tensor([0.35, 0.45, 0.6])[:, None, None] + tensor([0.05, 0.08, 0.15])[:, None, None]


def main() -> dict[str, object]:
    train_images, train_labels = make_images(1024, seed=1)
    model = make_network()
    train_batches = in_batches(train_images, train_labels)
    train(model, train_batches)

    images, labels = make_images(768, seed=2)
    images = second_camera(images)
    to_adapt, to_score = in_batches(images[:256], labels[:256]), in_batches(images[256:], labels[256:])
    found = tell(health.diagnose(model, to_score, reference=train_batches[:16]), ["BN111"])
    repaired = health.repair(model, to_score, [health.repairs.adapt(prior=16)], calibration=to_adapt)
    assert repaired.comparison is not None
    tell_change(repaired.comparison, "Statistics adapted on 256 other photos of that camera")
    print("The cause: the running statistics are those of the photos of another camera.")
    return {"found": found, "before": repaired.comparison.before, "after": repaired.comparison.after}


if __name__ == "__main__":
    main()
