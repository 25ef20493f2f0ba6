"""Every setting of a training, with its meaning, range and default. A default stands here and nowhere else."""

import math
import re
from os import PathLike, fspath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_MEGAPIXELS = 250.0  # the largest cameras of phones have 200
Range = tuple[float, float]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Colour = tuple[float, float, float]
_YEAR = 366 * 86_400.0  # seconds
_TIME_SPAN = "it must be a time span such as 20m, 1h30m or 90s: hours, minutes, seconds, each number with its unit"
Device = Literal["auto", "cpu", "cuda", "mps"]


def seconds_of(text: float | str) -> object:
    """A time span in seconds, from text such as "20m", "1h30m", "90s" or "90"; a number is returned unchanged.

    Raises:
        ValueError: the text is not a time span.
    """
    if isinstance(text, bool):
        raise ValueError(_TIME_SPAN)
    if not isinstance(text, str):
        return text
    text, number = text.strip().lower(), r"(\d+\.?\d*|\.\d+)\s*"
    if re.fullmatch(number, text, re.ASCII):
        return float(text)
    units = r"(?:hours?|hrs?|h)", r"(?:minutes?|mins?|m)", r"(?:seconds?|secs?|s)"
    found = re.fullmatch(r"\s*".join(f"(?:{number}{unit})?" for unit in units), text, re.ASCII)
    if found is None or not any(found.groups()):
        raise ValueError(_TIME_SPAN)
    return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True) if part)


def _range_of(given: object) -> object:
    """A range as two numbers, from text such as "0,4095", or from its upper end."""
    if isinstance(given, str):
        given = given.strip(" []()").split(",")
    ends: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    ends = [0, *ends] if len(ends) == 1 else ends
    try:
        low, high = (float(end) for end in ends)
    except (TypeError, ValueError):
        raise ValueError("it must be a number such as 4095, or two such as [0, 4095]") from None
    return low, high


def _rising(ends: Range) -> Range:
    if not -math.inf < ends[0] < ends[1] < math.inf:
        raise ValueError("its first number must be smaller than its second one, and both finite")
    return ends


PixelRange = Annotated[Range, BeforeValidator(_range_of), AfterValidator(_rising)]


def _in_order(plan: object) -> object:
    """The value of the key `plan`, checked."""
    last, end = -1, 1
    try:
        for step, steps, every in plan:  # type: ignore[attr-defined]
            if not last < step < min(steps, end) or every < 1:
                raise ValueError
            last, end = step, steps
    except (TypeError, ValueError):
        raise ValueError("it must be as bnlab wrote it: rising [step, steps, validate_every], from step 0 on") from None
    return plan


def path_text(path: str | PathLike[str]) -> object:
    """A path as text; what is not a path is returned unchanged."""
    return fspath(path) if isinstance(path, PathLike) else path


class Recipe(BaseModel):
    """Every setting of a training. The defaults are the recipe `default`."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, defer_build=True
    )

    network: str = "bn_googlenet"
    """Name of the network (`bnlab net` lists them)."""
    variant: str | None = None
    """Variant of the network, where it has several (unset: the first)."""
    norm: str | None = None
    """Kind of normalisation: none, batch, sync, ghost:SIZE or whitening:SIZE (unset: the network's own)."""
    norm_eps: Positive = 1e-5
    """Number that normalisation adds to the variance."""
    norm_momentum: Fraction | None = 0.1
    """Weight of the new batch in the running statistics (unset: they are the plain average of all batches)."""
    activation: str | None = None
    """Activation: relu, leaky_relu, elu, gelu, silu, sigmoid, tanh or none (unset: the network's own)."""
    placement: Literal["before", "after"] = "before"
    """Place of normalisation: before the activation, as in the paper, or after it."""
    conv_bias: bool = False
    """Keep the biases of convolutions that normalisation makes redundant."""
    width: Positive = 1.0
    """Factor on the number of channels of each layer of the network's table."""
    stem: str | None = None
    """First layers: separable (the paper's) or small (for photos of 32 to 64 px) (unset: the network's own)."""
    local_response: bool = False
    """Use GoogLeNet's local response normalisation in the stem."""
    initialisation: str | None = None
    """Initialisation of the weights: he, xavier or gaussian:STD (unset: he, or xavier before sigmoid and tanh)."""
    lsuv_init: bool = False
    """Scale each layer of a network without normalisation on the first batch to outputs with a mean square of 1."""
    auxiliary: bool = False
    """Train GoogLeNet's two auxiliary classifiers as well."""
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.3
    """Weight of each auxiliary classifier's loss; the main loss has weight 1."""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Fraction of the features before the last layer that is dropped (unset: the network's own)."""

    size: Annotated[int, Field(ge=16, le=2048)] = 128
    """Height and width of the image that the network takes, in pixels."""
    resize: Literal["squash", "crop"] = "crop"
    """How evaluation makes photos square: squash scales both sides, crop scales the short side and cuts the centre."""
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = 0.9
    """Fraction of the short side that the centre crop keeps, with resize crop."""
    mean: Colour = (0.485, 0.456, 0.406)
    """Numbers subtracted from the red, green and blue channel, on a scale of 0 to 1."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Numbers that the channels are divided by after that."""
    pixel_range: PixelRange | None = None
    """Values that are black and white in pictures of more than 8 bits a channel or of floating-point numbers, such as
    [0, 4095]; 4095 means the same (unset: as the file says, or [0, 65535])."""
    start_size: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Fraction of `size`, but at least 32 px, that training begins with; images grow to `size` in steps of 16 px."""
    pre_resize: Annotated[float, Field(ge=0, le=16)] = 1.25
    """Training crops from the photo shrunk to a short side of this many times `size`; caches keep that photo (0: crop
    from the original)."""
    crop_area: tuple[Fraction, Fraction] = (0.25, 1.0)
    """Smallest and largest fraction of the photo's area that a training crop takes."""
    crop_aspect: tuple[Positive, Positive] = (0.75, 1.3333333333333333)
    """Smallest and largest ratio of width to height of a training crop."""
    flip: Fraction = 0.5
    """Probability that training flips a photo left to right."""
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Largest fraction by which training changes brightness, contrast and saturation."""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Parameter a of the Beta(a, a) distribution that blends pairs of photos (Zhang et al. 2018) (0: no mixup)."""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Parameter a of the Beta(a, a) distribution of the area pasted from another photo (Yun et al. 2019) (0: none)."""
    shuffle: Literal["photos", "batches"] = "photos"
    """What each epoch shuffles: all photos, or batches that always hold the same photos (the paper's baseline)."""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 30
    """Number of passes through the training photos."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Number of optimiser steps, which replaces `epochs` (0: as many as the epochs have)."""
    time: Annotated[float, BeforeValidator(seconds_of), Field(gt=0, le=_YEAR)] | None = None
    """Wall-clock budget, such as 20m, 1h30m or 90 (seconds), which replaces `epochs`: the number of steps follows from
    measured speed (unset: no budget)."""
    plan: Annotated[tuple[tuple[int, int, int], ...], BeforeValidator(_in_order)] = ()
    """Steps that a training with `time` came to, which bnlab writes so that its recipe.yaml repeats it without a clock:
    a list of [step, steps, validate_every], each of which holds from that step on (empty: `epochs` or `steps` hold)."""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """Largest number of photos in a batch; photos are spread evenly over the steps, so that no last batch is tiny."""
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    """Number of batches whose gradients make one optimiser step, as a batch of `batch_size` times as many photos would;
    each is normalised by itself."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimiser: sgd (with Nesterov momentum), adam, or adamw (with decoupled weight decay)."""
    learning_rate: Positive = 0.05
    """Highest learning rate of the schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum of the optimizer sgd."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay of convolutions and linear layers, not of biases, gamma and beta: with sgd and adam an L2 penalty in
    the gradient; with adamw each step subtracts the learning rate times this fraction of the weights."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the gradient of all trained parameters together; a longer gradient is scaled down to it (0: no
    limit)."""
    schedule: Literal["constant", "step", "exponential", "one-cycle"] = "one-cycle"
    """How the learning rate changes over the steps."""
    warmup: Fraction = 0.2
    """Fraction of the steps in which the schedule one-cycle rises, before it falls to 0 as a cosine."""
    step_every: Annotated[int, Field(ge=1)] = 1500
    """Number of steps between two falls of the schedule step."""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of each fall of the schedule step."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.96
    """Factor by which the schedule exponential falls in `decay_epochs`."""
    decay_epochs: Positive = 8.0
    """Number of epochs in which the schedule exponential falls by `decay_factor`, a little at each step."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the target that is spread over all classes."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Number of epochs without a better validation accuracy after which training stops (0: it never stops early)."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the training's convolutions: float32, bfloat16 (autocast), or auto, which is bfloat16 where the
    machine is fast at it; validation and the saved weights are float32."""
    compile: bool = False
    """Train with torch.compile; it takes minutes to begin and is worth it on a GPU."""

    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the averaged weights that each step keeps; the average is validated and saved (0: no average)."""
    recalibration_images: Annotated[int, Field(ge=0)] = 1024
    """Number of training photos on which population statistics are measured before each validation (Alg. 2) (0: the
    running statistics are used)."""
    flip_tta: bool = False
    """Average the probabilities of a photo and its mirror image in evaluation and prediction, at twice the cost."""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """Number of epochs between validations; the last epoch is always validated (0: about ten validations in all)."""
    bn_monitor: bool = True
    """Monitor the health of batch normalisation during training, and warn of problems."""

    val: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the photos held out for validation if DATA is not split yet."""
    split_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of that split. `seed` does not change it, so that trainings with several seeds hold out the same photos."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed from which all other randomness follows."""
    init: Annotated[str, BeforeValidator(path_text)] | None = None
    """Classifier file or run folder (its best.safetensors) to start from, for fine-tuning (unset: random weights)."""
    backbone_lr_factor: Fraction = 1.0
    """Factor on the learning rate of all but the last layer and auxiliary classifiers (0.1 with `init`, unless set)."""
    freeze: Literal["none", "stem", "backbone"] = "none"
    """Part not trained, with init: stem (all before the first Inception block) or backbone (all but the last layer)."""
    freeze_bn: bool = False
    """Normalise by the statistics of the init file, in training too, and keep them, gamma and beta unchanged."""

    device: Device = "auto"
    """Device to train on (auto: the first of cuda, mps and cpu that is there)."""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """Number of threads that read photos (0: none, -1: as many as suit this machine); they never change a result."""
    max_megapixels: Annotated[float, Field(ge=0)] = MAX_MEGAPIXELS
    """Largest photo that is read, in millions of pixels, because a small file may claim a huge picture (0: any)."""
    cache: Literal["auto", "ram", "disk", "none"] = "auto"
    """Where decoded photos are kept (auto: in memory, or on disk if memory is too small); it never changes a result."""
    cache_gigabytes: Annotated[float, Field(ge=0)] = 0.0
    """Largest size of the cache in GiB (0: four tenths of the free memory, or half of the free disk)."""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between two checkpoints inside an epoch, from which an interrupted training resumes."""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for key in ("crop_area", "crop_aspect"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(
                    f"{key} must go from a positive number up to one at least as large, not {low} to {high}"
                )
        return self


# Keys that a resume may change: they change speed, never a result on the same kind of device.
MACHINE_KEYS = frozenset(
    {"device", "workers", "max_megapixels", "cache", "cache_gigabytes", "checkpoint_seconds", "bn_monitor"}
)
# Keys that a resume may also change, to train longer.
LENGTH_KEYS = frozenset({"epochs", "steps"})
# Keys that a training with `time` sets in its recipe.yaml, so that it repeats the training without a clock.
PLAN_KEYS = ("time", "steps", "plan")
