"""The keyword arguments of the functions in api.py, for type checkers and editors.

`make docs` writes this file from options.py and recipe.py.
"""

from os import PathLike
from typing import Literal, TypedDict


class _Train(TypedDict, total=False):
    network: str
    """Name of the network (`bnlab net` lists them)."""
    initialisation: str | None
    """Initialisation of the weights: he, xavier or gaussian:STD (unset: he, or xavier before sigmoid and tanh)."""
    lsuv_init: bool
    """Scale each layer of a network without normalisation on the first batch to outputs with a mean square of 1."""
    auxiliary: bool
    """Train GoogLeNet's two auxiliary classifiers as well."""
    auxiliary_weight: float
    """Weight of each auxiliary classifier's loss; the main loss has weight 1."""
    dropout: float | None
    """Fraction of the features before the last layer that is dropped (unset: the network's own)."""
    start_size: float
    """Fraction of `size`, but at least 32 px, that training begins with; images grow to `size` in steps of 16 px."""
    color_jitter: float
    """Largest fraction by which training changes brightness, contrast and saturation."""
    mixup: float
    """Parameter a of the Beta(a, a) distribution that blends pairs of photos (Zhang et al. 2018) (0: no mixup)."""
    cutmix: float
    """Parameter a of the Beta(a, a) distribution of the area pasted from another photo (Yun et al. 2019) (0: none)."""
    shuffle: Literal["photos", "batches"]
    """What each epoch shuffles: all photos, or batches that always hold the same photos (the paper's baseline)."""
    time: float | str | None
    """Wall-clock budget, such as 20m, 1h30m or 90 (seconds), which replaces `epochs`: the number of steps follows from
    measured speed (unset: no budget)."""
    plan: object
    """Steps that a training with `time` came to, which bnlab writes so that its recipe.yaml repeats it without a clock:
    a list of [step, steps, validate_every], each of which holds from that step on (empty: `epochs` or `steps` hold)."""
    accumulate: int
    """Number of batches whose gradients make one optimiser step, as a batch of `batch_size` times as many photos would;
    each is normalised by itself."""
    optimizer: Literal["sgd", "adam", "adamw"]
    """Optimiser: sgd (with Nesterov momentum), adam, or adamw (with decoupled weight decay)."""
    learning_rate: float
    """Highest learning rate of the schedule."""
    momentum: float
    """Momentum of the optimizer sgd."""
    weight_decay: float
    """Weight decay of convolutions and linear layers, not of biases, gamma and beta: with sgd and adam an L2 penalty in
    the gradient; with adamw each step subtracts the learning rate times this fraction of the weights."""
    clip_norm: float
    """Largest norm of the gradient of all trained parameters together; a longer gradient is scaled down to it (0: no
    limit)."""
    schedule: Literal["constant", "step", "exponential", "one-cycle"]
    """How the learning rate changes over the steps."""
    warmup: float
    """Fraction of the steps in which the schedule one-cycle rises, before it falls to 0 as a cosine."""
    step_every: int
    """Number of steps between two falls of the schedule step."""
    step_factor: float
    """Factor of each fall of the schedule step."""
    decay_factor: float
    """Factor by which the schedule exponential falls in `decay_epochs`."""
    decay_epochs: float
    """Number of epochs in which the schedule exponential falls by `decay_factor`, a little at each step."""
    label_smoothing: float
    """Fraction of the target that is spread over all classes."""
    patience: int
    """Number of epochs without a better validation accuracy after which training stops (0: it never stops early)."""
    precision: Literal["auto", "float32", "bfloat16"]
    """Number format of the training's convolutions: float32, bfloat16 (autocast), or auto, which is bfloat16 where the
    machine is fast at it; validation and the saved weights are float32."""
    compile: bool
    """Train with torch.compile; it takes minutes to begin and is worth it on a GPU."""
    ema: float
    """Fraction of the averaged weights that each step keeps; the average is validated and saved (0: no average)."""
    recalibration_images: int
    """Number of training photos on which population statistics are measured before each validation (Alg. 2) (0: the
    running statistics are used)."""
    flip_tta: bool
    """Average the probabilities of a photo and its mirror image in evaluation and prediction, at twice the cost."""
    val: float
    """Fraction of the photos held out for validation if DATA is not split yet."""
    split_seed: int
    """Seed of that split. `seed` does not change it, so that trainings with several seeds hold out the same photos."""
    seed: int
    """Seed from which all other randomness follows."""
    init: str | PathLike[str] | None
    """Classifier file or run folder (its best.safetensors) to start from, for fine-tuning (unset: random weights)."""
    backbone_lr_factor: float
    """Factor on the learning rate of all but the last layer and auxiliary classifiers (0.1 with `init`, unless set)."""
    freeze: Literal["none", "stem", "backbone"]
    """Part not trained, with init: stem (all before the first Inception block) or backbone (all but the last layer)."""
    freeze_bn: bool
    """Normalise by the statistics of the init file, in training too, and keep them, gamma and beta unchanged."""


class _TrainAndImportWeights(TypedDict, total=False):
    variant: str | None
    """Variant of the network, where it has several (unset: the first)."""
    norm: str | None
    """Kind of normalisation: none, batch, sync, ghost:SIZE or whitening:SIZE (unset: the network's own)."""
    norm_eps: float
    """Number that normalisation adds to the variance."""
    norm_momentum: float | None
    """Weight of the new batch in the running statistics (unset: they are the plain average of all batches)."""
    activation: str | None
    """Activation: relu, leaky_relu, elu, gelu, silu, sigmoid, tanh or none (unset: the network's own)."""
    placement: Literal["before", "after"]
    """Place of normalisation: before the activation, as in the paper, or after it."""
    conv_bias: bool
    """Keep the biases of convolutions that normalisation makes redundant."""
    local_response: bool
    """Use GoogLeNet's local response normalisation in the stem."""


class _TrainAndImportWeightsAndStudy(TypedDict, total=False):
    width: float
    """Factor on the number of channels of each layer of the network's table."""
    stem: str | None
    """First layers: separable (the paper's) or small (for photos of 32 to 64 px) (unset: the network's own)."""
    size: int
    """Height and width of the image that the network takes, in pixels."""
    resize: Literal["squash", "crop"]
    """How evaluation makes photos square: squash scales both sides, crop scales the short side and cuts the centre."""
    crop_fraction: float
    """Fraction of the short side that the centre crop keeps, with resize crop."""
    mean: tuple[float, float, float]
    """Numbers subtracted from the red, green and blue channel, on a scale of 0 to 1."""
    std: tuple[float, float, float]
    """Numbers that the channels are divided by after that."""


class _TrainAndStudy(TypedDict, total=False):
    pixel_range: object | None
    """Values that are black and white in pictures of more than 8 bits a channel or of floating-point numbers, such as
    [0, 4095]; 4095 means the same (unset: as the file says, or [0, 65535])."""
    pre_resize: float
    """Training crops from the photo shrunk to a short side of this many times `size`; caches keep that photo (0: crop
    from the original)."""
    crop_area: tuple[float, float]
    """Smallest and largest fraction of the photo's area that a training crop takes."""
    crop_aspect: tuple[float, float]
    """Smallest and largest ratio of width to height of a training crop."""
    flip: float
    """Probability that training flips a photo left to right."""
    batch_size: int
    """Largest number of photos in a batch; photos are spread evenly over the steps, so that no last batch is tiny."""
    validate_every: int
    """Number of epochs between validations; the last epoch is always validated (0: about ten validations in all)."""


class _TrainAndResumeAndStudy(TypedDict, total=False):
    epochs: int
    """Number of passes through the training photos."""
    steps: int
    """Number of optimiser steps, which replaces `epochs` (0: as many as the epochs have)."""
    max_megapixels: float
    """Largest photo that is read, in millions of pixels, because a small file may claim a huge picture (0: any)."""
    checkpoint_seconds: float
    """Seconds between two checkpoints inside an epoch, from which an interrupted training resumes."""


class _TrainAndResume(TypedDict, total=False):
    bn_monitor: bool
    """Monitor the health of batch normalisation during training, and warn of problems."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """Device to train on (auto: the first of cuda, mps and cpu that is there)."""
    workers: int
    """Number of threads that read photos (0: none, -1: as many as suit this machine); they never change a result."""
    cache: Literal["auto", "ram", "disk", "none"]
    """Where decoded photos are kept (auto: in memory, or on disk if memory is too small); it never changes a result."""
    cache_gigabytes: float
    """Largest size of the cache in GiB (0: four tenths of the free memory, or half of the free disk)."""


class Split(TypedDict, total=False):
    val: float
    """Fraction of the photos that goes to val, for validation."""
    test: float
    """Fraction of the photos that goes to test, for a last measurement."""
    seed: int
    """Seed of the split. Another seed gives another split."""
    pixel_range: object | None
    """Values that are black and white in pictures of more than 8 bits a channel or of floating-point numbers, such as
    0,4095; 4095 means the same (default: as the file says). Train with the same pixel_range."""
    how: Literal["link", "copy", "list"]
    """What is written: "link" (hard links, or copies where the disk has no hard links), "copy", or "list" (split.csv
    only)."""
    strict: bool
    """Stop with an error if a photo cannot be used, instead of leaving it out."""
    max_megapixels: float
    """Largest photo that is read, in millions of pixels, because a small file may claim a huge picture (0: any)."""


class Train(
    _Train,
    _TrainAndImportWeights,
    _TrainAndImportWeightsAndStudy,
    _TrainAndStudy,
    _TrainAndResumeAndStudy,
    _TrainAndResume,
    total=False,
):
    recipe: str | PathLike[str]
    """Settings of the training: a YAML file, or one of the names default, classic, digits, and the paper's inception,
    bn-baseline, bn-x5, bn-x30 and bn-x5-sigmoid."""
    name: str | None
    """Name of the run folder (default: train, train2, ...)."""
    runs: str | PathLike[str]
    """Folder in which the folders of runs lie."""
    strict: bool
    """Stop with an error if a photo cannot be used, instead of leaving it out."""


class FindLr(
    _Train,
    _TrainAndImportWeights,
    _TrainAndImportWeightsAndStudy,
    _TrainAndStudy,
    _TrainAndResumeAndStudy,
    _TrainAndResume,
    total=False,
):
    recipe: str | PathLike[str]
    """Settings of the training: a YAML file, or one of the names default, classic, digits, and the paper's inception,
    bn-baseline, bn-x5, bn-x30 and bn-x5-sigmoid."""
    runs: str | PathLike[str]
    """Folder in which the folders of runs lie."""
    strict: bool
    """Stop with an error if a photo cannot be used, instead of leaving it out."""


class Resume(_TrainAndResumeAndStudy, _TrainAndResume, total=False):
    pass


class Evaluate(TypedDict, total=False):
    split: Literal["train", "val", "test", "all"] | None
    """Split to evaluate on (default: the first of test, val, train and all that DATA has)."""
    crops: Literal[1, 10, 144]
    """Number of crops of each photo, flipped ones included, whose probabilities are averaged: 10 as in Krizhevsky et
    al. 2012, or 144 as in GoogLeNet and in figure 4 of the BN paper. Time grows in proportion."""
    workers: int
    """Number of threads that read photos (0: none, -1: as many as suit this machine)."""
    runs: str | PathLike[str]
    """Folder in which the folders of runs lie."""
    strict: bool
    """Stop with an error if a photo cannot be used, instead of leaving it out."""
    max_megapixels: float
    """Largest photo that is read, in millions of pixels, because a small file may claim a huge picture (0: any)."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """Device to run on (default: the first of cuda, mps and cpu that is there)."""
    batch_size: int
    """Number of images that go through the network at a time."""


class Predict(TypedDict, total=False):
    top: int
    """Number of classes to give for each photo, the most probable first."""
    csv: str | PathLike[str] | None
    """New CSV file to write the predictions to as well (default: none)."""
    show: bool
    """Make a picture of the photos with their predictions, and open it."""
    runs: str | PathLike[str]
    """Folder in which the folders of runs lie."""
    strict: bool
    """Stop with an error if a photo cannot be used, instead of leaving it out."""
    max_megapixels: float
    """Largest photo that is read, in millions of pixels, because a small file may claim a huge picture (0: any)."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """Device to run on (default: the first of cuda, mps and cpu that is there)."""
    batch_size: int
    """Number of images that go through the network at a time."""


class ImportWeights(_TrainAndImportWeights, _TrainAndImportWeightsAndStudy, total=False):
    classes: str | PathLike[str] | None
    """File of the class names in the order of the network's outputs: JSON ({"0": NAME, ...} or a list), or one name a
    line (default: the names are 0, 1, ...)."""
    format: str | None
    """What wrote the file: tutorial, torchvision, caffe or bnlab (default: found from the names of the tensors)."""
    network: str | None
    """Name of the network (default: found from the names and shapes of the tensors)."""
    prefix: str | None
    """What the names of the network's tensors begin with, where FILE holds several networks, such as model. and
    ema_model. (default: found from the name of the last layer)."""


class Study(_TrainAndImportWeightsAndStudy, _TrainAndStudy, _TrainAndResumeAndStudy, total=False):
    data: str | PathLike[str] | None
    """Images to measure on: MNIST's IDX files, a split folder, a split.csv or a folder of classes (default: scikit-
    learn's handwritten digits)."""
    seeds: int
    """Number of seeds. The verdict follows from the interval over them, so fewer than 3 show little."""
    budget: Literal["quick", "full"]
    """What a study may cost: quick takes about 3 minutes a study on two cores, full has the scale of the paper."""
    processes: int
    """Number of trainings at a time on a CPU, each on one core (-1: one for each core, 0: in this process)."""
    name: str | None
    """Name of the folder in runs/ (default: study-STUDY, study-STUDY2, ...)."""
    runs: str | PathLike[str]
    """Folder in which the folders of runs lie."""
    device: Literal["auto", "cpu", "cuda", "mps"]
    """Device to run on (default: the first of cuda, mps and cpu that is there)."""
