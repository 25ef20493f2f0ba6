"""Every setting of a training, with its meaning, its range and its default: a default stands here and nowhere else."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Colour = tuple[float, float, float]


def seconds_of(text: object) -> object:
    """A span of time, such as "20m", "1h30m", "90s" or a number of seconds, in seconds.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip().lower())
    try:
        if found is None or not any(found.groups()):
            raise ValueError
        return sum(float(part) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True) if part)
    except ValueError:
        raise ValueError("a span of time is written like 20m, 1h30m or 90s") from None


class Recipe(BaseModel):
    """Every setting of a training. The defaults are the recipe `default`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    network: str = "bn_googlenet"
    """which network of bnlab.nets (`bnlab net` lists them)"""
    variant: str | None = None
    """of its table, where there are several; none: the first"""
    norm: str | None = None
    """none, batch, sync, ghost:SIZE or whitening:SIZE; left out: the network's own"""
    norm_eps: Positive = 1e-5
    """normalisation: added to the variance"""
    norm_momentum: Fraction | None = 0.1
    """normalisation: weight of the new batch in the running statistics; none: their plain average"""
    activation: str | None = None
    """relu, leaky_relu, elu, gelu, silu, sigmoid, tanh or none; left out: the network's own"""
    placement: Literal["before", "after"] = "before"
    """normalise before the activation (as the paper) or after it"""
    conv_bias: bool = False
    """keep the biases that normalisation makes redundant"""
    width: Positive = 1.0
    """how many times as wide each layer is as in the table"""
    stem: str | None = None
    """other first layers: separable (as the paper's) or small (for photos of 32 to 64 px); none: the table's own"""
    local_response: bool = False
    """GoogLeNet's local response normalisation, in the stem"""
    initialisation: str | None = None
    """he, xavier or gaussian:STD; none: he, or xavier before sigmoid and tanh"""
    lsuv_init: bool = False
    """without normalisation: scale every layer on the first batch, so that its outputs begin with a mean square of 1"""
    auxiliary: bool = False
    """train GoogLeNet's two auxiliary classifiers beside the main one"""
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.3
    """what each auxiliary loss counts for beside the main one"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """share of the features before the last layer that is dropped; left out: the network's own"""

    size: Annotated[int, Field(ge=16, le=2048)] = 128
    """side of the square the network sees, in pixels"""
    resize: Literal["squash", "crop"] = "crop"
    """how evaluation makes the square: squash (both sides to `size`) or crop (short side, then the centre)"""
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = 0.9
    """`crop`: share of the short side that the centre crop keeps"""
    mean: Colour = (0.485, 0.456, 0.406)
    """subtracted from each channel (RGB, in 0..1)"""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """divides each channel after that"""
    start_size: Annotated[float, Field(gt=0, le=1)] = 0.5
    """training begins with squares of this share of `size`, but of 32 px at least, which grow to it, 16 px at a time"""
    pre_resize: Annotated[float, Field(ge=0, le=16)] = 1.25
    """training crops from the photo shrunk to a short side of so many times `size`, which is what a cache keeps; 0:
    from the photo as it is"""
    crop_area: tuple[Fraction, Fraction] = (0.25, 1.0)
    """training crops a part of the photo of this share of its area, from and to"""
    crop_aspect: tuple[Positive, Positive] = (0.75, 1.3333333333333333)
    """and of this aspect (width to height), from and to"""
    flip: Fraction = 0.5
    """chance that training mirrors a photo left to right"""
    color_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """training varies brightness, contrast and saturation by up to this share"""
    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """training blends pairs of photos, by shares from Beta(a, a) with this a (Zhang et al. 2018); 0: never"""
    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """training pastes a rectangle of one photo into another, of a share from Beta(a, a) (Yun et al. 2019); 0: never"""
    shuffle: Literal["photos", "batches"] = "photos"
    """what each epoch shuffles: all photos, or batches whose photos always stand together (the paper's baseline)"""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 30
    """how often training goes through all photos"""
    steps: Annotated[int, Field(ge=0)] = 0
    """optimiser steps in all, in place of `epochs`; 0: as many as the epochs have"""
    time: Annotated[float, BeforeValidator(seconds_of), Field(gt=0)] | None = None
    """wall-clock budget, such as 20m, 1h30m or 90 (seconds): `steps` is planned from measured speed, to end on time"""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """photos to a step, at most; what is left over is spread evenly, so that no last batch is tiny"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd (with Nesterov momentum) or adam"""
    learning_rate: Positive = 0.05
    """the highest learning rate of the schedule"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """`sgd`: its momentum"""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty on the weights of convolutions and linear layers; biases, gamma and beta go without"""
    schedule: Literal["constant", "step", "exponential", "one-cycle"] = "one-cycle"
    """how the learning rate moves over the steps"""
    warmup: Fraction = 0.2
    """`one-cycle`: share of the steps in which it rises, before it falls to 0 as a cosine"""
    step_every: Annotated[int, Field(ge=1)] = 1500
    """`step`: steps between two falls"""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """`step`: what each fall multiplies by"""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.96
    """`exponential`: what the learning rate falls to in `decay_epochs`"""
    decay_epochs: Positive = 8.0
    """`exponential`: epochs in which it falls so far, step by step"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """share of the target spread over all classes"""
    patience: Annotated[int, Field(ge=0)] = 0
    """stop after so many epochs without a better validation accuracy (0: never)"""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """numbers of the training's convolutions: bfloat16 (autocast), float32, or auto: bfloat16 where it is fast; what is
    judged and kept is float32"""
    compile: bool = False
    """train with torch.compile: minutes to begin, worth it on a GPU"""

    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """judge and keep an average of the weights, of which each step leaves this share; 0: the weights themselves"""
    recalibration_images: Annotated[int, Field(ge=0)] = 1024
    """before it is judged, measure the network's population statistics on so many training photos (Alg. 2); 0: judge by
    the running statistics"""
    flip_tta: bool = False
    """evaluation and prediction average the answers for the photo and its mirror image, at twice the cost"""
    validate_every: Annotated[int, Field(ge=0)] = 0
    """epochs from one judgement on val to the next, the last always judged; 0: about ten judgements in all"""
    bn_monitor: bool = True
    """watch the health of batch normalisation during training, and warn"""

    val: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the photos held out for validation where DATA is not split yet"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """all randomness follows from it"""
    init: str | None = None
    """classifier file to start from (fine-tuning)"""
    backbone_lr_factor: Fraction = 1.0
    """factor on the learning rate of all but the last layer (and auxiliary heads); 0.1 with `init` unless set"""
    freeze: Literal["none", "stem", "backbone"] = "none"
    """`init`: do not train the stem (before the first Inception block), or the backbone (all but the last layer)"""
    freeze_bn: bool = False
    """`init`: normalise by the file's statistics, in training too, and keep them, gamma and beta as they are"""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the network runs"""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """threads that read photos (0: none, -1: as many as suit this machine); they never change a result"""
    cache: Literal["auto", "ram", "disk", "none"] = "auto"
    """where photos stay once decoded; auto: in memory, on disk where that is too small. It never changes a result"""
    cache_gigabytes: Annotated[float, Field(ge=0)] = 0.0
    """the most a cache takes, in GiB; 0: four tenths of the free memory, or half of the free disk"""
    checkpoint_seconds: Annotated[float, Field(ge=0)] = 60.0
    """save what a resume needs this often inside an epoch"""

    @model_validator(mode="after")
    def _ranges_rise(self) -> Self:
        for key in ("crop_area", "crop_aspect"):
            low, high = getattr(self, key)
            if not 0 < low <= high:
                raise ValueError(
                    f"{key} must go from a positive number up to one at least as large, not {low} to {high}"
                )
        return self


# What may differ when a run is resumed: it changes speed, never a result on the same kind of device.
MACHINE_KEYS = frozenset({"device", "workers", "cache", "cache_gigabytes", "checkpoint_seconds", "bn_monitor"})
# A key that has an effect only beside these values of another.
ONLY_WITH: Mapping[str, tuple[str, object]] = {
    "epochs": ("time", None),
    "steps": ("time", None),
    "momentum": ("optimizer", "sgd"),
    "warmup": ("schedule", "one-cycle"),
    "step_every": ("schedule", "step"),
    "step_factor": ("schedule", "step"),
    "decay_factor": ("schedule", "exponential"),
    "decay_epochs": ("schedule", "exponential"),
    "auxiliary_weight": ("auxiliary", True),
    "crop_fraction": ("resize", "crop"),
    "initialisation": ("init", None),
    "lsuv_init": ("init", None),
}
