"""The same weights are worse in my script than in training, although nothing fails: images come from OpenCV.

The story: in xiaochus/YOLOv3#22 detection improves once the channels are swapped back, since cv2.imread gives BGR and
the weights were trained on RGB; EdjeElectronics/TensorFlow-Object-Detection-API-Tutorial-Train-Multiple-Objects-
Windows-10#369 warns of the same. Here a network is trained on RGB and gets BGR.

The cause: red and blue are swapped, so that the first layer's inputs are not those that its statistics are of. No shape
differs, so nothing raises an error.

What to do: swap the channels once, where the image is read (`cv2.cvtColor(image, cv2.COLOR_BGR2RGB)`). To adapt the
statistics instead mends nothing, as the last comparison shows: the weights still look for blue where red is.
"""

from bnlab import health
from shapes import compare, in_batches, is_correct, make_images, make_network, tell, tell_change, train


def main() -> dict[str, object]:
    train_images, train_labels = make_images(1024, seed=1)
    val_images, val_labels = make_images(512, seed=2)
    model = make_network()
    train(model, in_batches(train_images, train_labels))

    bgr = in_batches(val_images.flip(1), val_labels)  # what cv2.imread gives
    found = tell(health.diagnose(model, bgr), ["BN112"])
    rgb = in_batches(val_images, val_labels)
    comparison = compare(is_correct(model, bgr), is_correct(model, rgb))
    tell_change(comparison, "Images in the order of the training, RGB")

    adapted = health.repair(model, bgr, [health.repairs.adapt()])
    assert adapted.comparison is not None
    tell_change(adapted.comparison, "For comparison, statistics adapted to BGR")
    print("The cause: the network was trained on RGB, and OpenCV reads images as BGR.")
    return {"found": found, "before": comparison.before, "after": comparison.after}


if __name__ == "__main__":
    main()
