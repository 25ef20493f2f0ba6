"""What the checks read: measurements of a network, its layers and whatever else the caller gave.

A part that was not measured is None, and the checks that need it are skipped. Arrays are float64 with one value for
each of a layer's C channels. A variance is unbiased.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from bnlab.health.compare import Comparison, Kind

Floats = NDArray[np.float64]
T = TypeVar("T")
Family = Literal["batch", "instance", "whitening", "frozen"]
"""frozen: a class that keeps statistics as constants, such as torchvision's FrozenBatchNorm2d"""
SCORINGS = ("running", "batch", "population")
SAMPLED_BATCHES = 8  # from which on the effective batch size can be told
_OFF_MEAN, _OFF_VARIANCE = 0.1, 1.25  # as in norm.recalibrate: standard deviations, and a factor

PARTS = {  # a check needs some of these; the text says how to have them measured
    "running": "a forward with the running statistics that works",
    "batch": "a forward with batch statistics that works",
    "population": "a forward with batch statistics that works",
    "scores": "labels, or a metric",
    "effective_batch": "batches with two or more images, at least eight of them",
    "optimizer": "the optimiser: pass optimizer=",
    "averaged": "the averaged model: pass averaged=",
    "checkpoint": "the file of the weights: pass checkpoint=",
    "train_step": "a training step: pass train_step=, a function of the model and a batch",
    "validation": "the caller's validation: pass validate=, a function of the model",
    "augmented": "training batches with their augmentation: pass augmented=",
    "reference": "training images without augmentation: pass reference=",
    "sources": "which source each image comes from: pass sources=",
    "padding": "which positions are padding: pass padding=",
    "ranks": "the statistics of more than one process: diagnose in all of them, or pass ranks=",
    "sync": "synchronised layers",
    "folding": "a model that runs on a batch",
    "backends": "a model that runs on a batch",
    "preprocessing": "images as N x 3 x H x W",
    "resolution": "images as N x C x H x W",
    "colours": "images as N x 3 x H x W",
    "eps": "running statistics, and a forward that works",
    "dropout": "a forward with batch statistics that works",
    "alone": "a model that runs on a batch",
    "hidden": "a model that runs on a batch",
    "state_dict": "a model that shows its layers",
    "outdated": "a model that shows its layers",
    "modes": "a model that shows its layers",
    "train_mode": "a model that was passed in training mode",
    "training": "a model that runs in training mode",
    "uses": "a layer that is called more than once in a forward",
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The inputs of one layer over all images."""

    count: int
    """values of each channel, over all images and positions"""
    batches: int
    mean: Floats
    variance: Floats
    between: Floats
    """variance between batches of the batch mean, for batches of the usual size"""
    successive: Floats | None = None
    """the same by half the mean squared difference of successive batches, in which slow drift does not count"""
    between_images: Floats | None = None
    """variance between images of the image's mean, within batches; None where an image has several rows"""
    groups: Floats | None = None
    """groups x 2 x C: means and variances of up to 32 parts of the batches, for a bootstrap"""
    largest: float = 0.0
    """the largest |value|, or if that is below 32752 possibly a larger bound of it that is below that too; infinite if
    any value was not finite"""


@dataclass(frozen=True, kw_only=True)
class LayerEvidence:
    """One normalisation layer that keeps statistics, or could."""

    name: str
    kind: str
    """name of the class"""
    family: Family
    channels: int
    eps: float
    momentum: float | None = 0.1
    tracks: bool = True
    """track_running_stats"""
    training: bool = False
    """its mode when the caller passed the model"""
    frozen: bool = False
    """by norm.freeze"""
    gamma: Floats | None = None
    beta: Floats | None = None
    gamma_trained: bool = False
    beta_trained: bool = False
    running_mean: Floats | None = None
    running_variance: Floats | None = None
    updates: int | None = None
    """num_batches_tracked"""
    dtype: str = "float32"
    """of the running statistics"""
    outdated: bool = False
    """whether its population statistics are marked as those of earlier weights, as bnlab.norm does"""
    # From one forward of a few images:
    calls: int = 0
    """how often one forward calls it"""
    inputs: int = 1
    """how many tensors it is called with; of a layer that takes a mask, too, it is 2"""
    values_per_image: int | None = None
    """positions of one image: H x W of its input"""
    dims: int | None = None
    before: str | None = None
    """name of the module whose output it normalises; None: not known, or a function made it"""
    before_kind: str | None = None
    """name of that module's class"""
    before_bias: Floats | None = None
    """the bias of the convolution or linear layer before it; None where dropout is between them"""
    before_weight: Floats | None = None
    """the largest |weight| of each channel of the convolution or linear layer before it"""
    before_shared: bool = False
    """whether something else reads the output of the layer before it, too"""
    activation: str | None = None
    """name of the activation that follows it directly, such as relu"""
    depth: int | None = None
    """its number in the order of the calls"""
    # From all images:
    evaluation: Sample | None = None
    """its inputs, where all layers normalise by their running statistics"""
    batch: Sample | None = None
    """its inputs, where all layers normalise as in training; these are the population statistics"""
    not_finite: bool = False
    """whether it got values that are not finite"""
    positives: Floats | None = None
    """how many of its outputs are not at most 0, where all layers normalise by their running statistics; NaN for the
    channels that were not counted, which are those not in `statistics.dead_by_parameters`"""
    # From the steps that the monitor of a training samples:
    effective_batch: float | None = None
    """N_eff, pooled over channels: how many independent values the batch statistics are worth"""
    effective_batch_at_most: float | None = None
    """upper end of its 95% interval"""
    sampled: int = 0
    """batches that gave the effective batch"""
    dead: int = 0
    """channels of which the ReLU after the layer passes fewer than 1 in 1,000 values, by gamma and beta"""
    near_zero: int | None = None
    """channels whose |gamma| is below 1% of the layer's median"""
    off_share: float | None = None
    """fraction of channels whose running statistics are off; see `off`"""
    mean_off: float | None = None
    """the largest distance of a channel's running mean from the population's, in population standard deviations"""
    variance_off: float | None = None
    """the largest ratio of a channel's running and population variance, or its inverse: 1 means equal"""

    @property
    def usable(self) -> bool:
        """Whether it has running statistics that are finite."""
        return self.running_mean is not None and self.running_variance is not None and self.finite

    @property
    def finite(self) -> bool:
        arrays = (self.running_mean, self.running_variance)
        return all(a is None or bool(np.isfinite(a).all()) for a in arrays)

    @property
    def initial_weight(self) -> float | None:
        """How much a moving average of so many batches still weighs the initial (0, 1): (1 - m)^n after n batches.

        Of recalibrated statistics this is not true, although they have the same fields.
        """
        if self.updates is None or not self.tracks or self.momentum is None:
            return 0.0 if self.momentum is None and self.updates else None
        return float((1 - self.momentum) ** self.updates)


def distances(
    mean: Floats, variance: Floats, other_mean: Floats, other_variance: Floats, eps: float
) -> tuple[Floats, Floats]:
    """How far statistics are from others: |difference of means| in others' standard deviations, and the variances'
    ratio or its inverse, whichever is larger; C each. Both variances have eps added, as the layer does.
    """
    with np.errstate(all="ignore"):
        off = np.abs(mean - other_mean) / np.sqrt(other_variance + eps)
        ratio = (variance + eps) / (other_variance + eps)
        return off, np.maximum(ratio, 1 / ratio)


def is_off(mean_off: Floats, variance_off: Floats) -> NDArray[np.bool_]:
    """Which channels are off: by more than 0.1 standard deviations or a factor of 1.25; true for NaN."""
    return ~((mean_off <= _OFF_MEAN) & (variance_off <= _OFF_VARIANCE))


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Each image's score: 1 or 0 for a correct or wrong class, or the caller's metric, where higher is better."""

    running: Floats | None = None
    """by the running statistics"""
    batch: Floats | None = None
    """by batch statistics, as in training but without dropout"""
    population: Floats | None = None
    """by recalibrated statistics"""
    kind: Kind = "accuracy"

    def means(self) -> dict[str, float | None]:
        values = {key: getattr(self, key) for key in SCORINGS}
        return {key: None if value is None else float(value.mean()) for key, value in values.items()}

    def compare(self, before: str, after: str) -> Comparison | None:
        first, second = getattr(self, before), getattr(self, after)
        return None if first is None or second is None else Comparison.measure(first, second, self.kind)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that the checks of one diagnosis read."""

    layers: Mapping[str, LayerEvidence]
    """by name, in the order of their first call; layers that were never called come last"""
    model: str = "the model"
    images: int = 0
    batches: int = 0
    batch_size: int = 0
    """of the usual batch"""
    last_batch_size: int | None = None
    single: Mapping[str, int] = field(default_factory=dict)
    """of the layers that got batches with one value for each channel: how many, by name"""
    root_training: bool = False
    """whether the caller passed the model in training mode"""
    training_modules: tuple[str, ...] = ()
    """names of the modules that were in training mode, with their class: "drop (Dropout)" """
    scores: Scores | None = None
    classes_in_batch: tuple[float, float] | None = None
    """distinct classes in a batch on average, and how many there would be in shuffled batches"""
    other_norms: Mapping[str, int] = field(default_factory=dict)
    """normalisation layers that keep no statistics, by class: {"GroupNorm": 12}"""
    parts: Mapping[str, Any] = field(default_factory=dict)
    """what `gather/` measured beyond the layers, by the names of PARTS"""
    notes: tuple[str, ...] = ()
    """what could not be measured, and why"""

    @property
    def sorted_by_class(self) -> bool:
        """Whether batches hold far fewer classes than shuffled ones would, so that batch statistics say nothing."""
        if self.classes_in_batch is None:
            return False
        found, shuffled = self.classes_in_batch
        return found < 0.7 * shuffled

    def has(self, part: str) -> bool:
        if part == "scores":
            return self.scores is not None
        if part in ("running", "batch"):
            if self.scores is not None and getattr(self.scores, part) is not None:
                return True
            which = "evaluation" if part == "running" else "batch"
            return any(getattr(layer, which) is not None for layer in self.layers.values())
        if part == "population":
            return any(layer.batch is not None or layer.off_share is not None for layer in self.layers.values())
        if part == "effective_batch":
            sampled = [layer.batch.batches if layer.batch else layer.sampled for layer in self.normalised]
            return any(number >= SAMPLED_BATCHES for number in sampled)
        return self.parts.get(part) is not None

    def part(self, name: str, kind: type[T]) -> T:
        """A part that `has` says is there, of the class that its file in `gather/` defines."""
        found = self.parts[name]
        assert isinstance(found, kind)
        return found

    @property
    def normalised(self) -> list[LayerEvidence]:
        """The batch normalisation layers and their kin, in order."""
        return [layer for layer in self.layers.values() if layer.family in ("batch", "whitening")]
