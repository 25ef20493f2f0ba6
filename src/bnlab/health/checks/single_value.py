"""A layer gets batches with one value for each channel.

## What it measures

The number of values that each layer normalises over in each batch: the number of images times the number of positions
of the layer's input.

## Why it is bad

One value has no variance. PyTorch raises an error in training, "Expected more than 1 value per channel when training":
often hours after the start, because just the last batch of an epoch is so small. Where it does not raise, the output is
beta, whatever the image is.

## Reported when

More than half of the batches have one value for each channel at a layer: an error. If only some batches have, such as
the last one, it is an error if they are batches of the training (if train_step was passed), or if the layer has no
running statistics, since then evaluation fails as well; otherwise it is advice, because evaluation can use such a
batch. A frozen layer is not reported.

## Known limits

The batches of the training are not known unless they are passed: its last batch has another size. Of a SyncBatchNorm,
the values of all processes count, of which the doctor sees one. Layers that only training reaches, such as auxiliary
heads, are not seen.

## Remedy

Leave out the last batch of an epoch (drop_last=True) or merge it with the one before. If all batches are concerned, use
batches of two or more images or larger images, freeze the layer, or put it before the pooling.

## References

Ioffe & Szegedy 2015, Algorithm 1; pytorch#4534 (an error in training for a batch of one).
"""

from bnlab.health.check import Check, Finding, name_layers
from bnlab.health.evidence import Evidence

CHECK = Check(
    id="BN001", name="single-value", severity="error", stage="preview", safety="display only", reads=("train_step",)
)


def check(evidence: Evidence) -> list[Finding]:
    layers = [layer for layer in evidence.normalised if layer.name in evidence.single and not layer.frozen]
    if not layers:
        return []
    number = max(evidence.single[layer.name] for layer in layers)
    usual = 2 * number > evidence.batches
    fails = any(layer.running_mean is None for layer in layers)
    exact = usual or fails or evidence.has("train_step")
    last = number == 1 and evidence.last_batch_size is not None and evidence.last_batch_size < evidence.batch_size
    where = "the last batch" if last else f"{number} of {evidence.batches} batches"
    names = tuple(layer.name for layer in layers)
    return [
        CHECK.finding(
            severity="error" if exact else "info",
            layers=names,
            message=(
                f"{where} gave {name_layers(names, of=len(evidence.normalised))} one value for each channel, of which "
                f"PyTorch refuses to take the variance in {'training and evaluation' if fails else 'training'}"
            ),
            numbers={
                "batches": number,
                "of_batches": evidence.batches,
                "batch_size": evidence.batch_size,
                "last_batch_size": evidence.last_batch_size,
                "values_per_image": layers[0].values_per_image,
            },
            cause=(
                "the layer has no positions left, such as after a global pooling, and the batch has one image"
                if usual
                else "the number of images is a multiple of the batch size plus one, and the layer has one position"
            ),
            remedy=(
                "use batches of two or more images or larger images, or freeze the layer"
                if usual
                else "leave out or merge that batch alone, if training has such a one"
            ),
            command="" if usual else "DataLoader(dataset, batch_size, shuffle=True, drop_last=True)",
        )
    ]
