"""I copied all weights from Keras, every tensor is equal, and the outputs are not.

The story: gzuidhof/nn-transfer#3 finds that large networks moved from Keras to PyTorch give other outputs because the
layers of Keras have eps 1e-3 and those of PyTorch 1e-5; qqwweee/keras-yolo3#451 has the same difference the other way.
Here a network is trained with 1e-3, from small weights, and its tensors are copied into one with PyTorch's default.

The cause: eps is a constant of the layer, and no tensor of the file holds it. Where variances are as small as 1e-3, it
is a good part of what values are divided by, so the layers put out other scales than in training.

What to do: set eps to the value of the original: 1e-3 for TensorFlow and Keras.
"""

import torch
from torch import nn

from bnlab import health
from shapes import in_batches, make_images, make_network, tell, tell_change, train


def main() -> dict[str, object]:
    train_batches, val_batches = in_batches(*make_images(1024, seed=1)), in_batches(*make_images(512, seed=2))
    original = make_network(eps=1e-3)
    with torch.no_grad():
        for layer in original.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(0.03)
    train(original, train_batches, optimizer=torch.optim.Adam(original.parameters(), 0.001))

    port = make_network(seed=1)  # eps is 1e-5
    port.load_state_dict(original.state_dict())
    found = tell(health.diagnose(port.eval(), val_batches), ["BN026"])
    repaired = health.repair(port, val_batches, [health.repairs.set_eps(1e-3)])
    assert repaired.comparison is not None
    tell_change(repaired.comparison, "eps 1e-3 in all layers")
    print("The cause: the network was trained with eps 1e-3, and the copy has PyTorch's 1e-5.")
    return {"found": found, "before": repaired.comparison.before, "after": repaired.comparison.after}


if __name__ == "__main__":
    main()
