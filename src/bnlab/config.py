"""Settings: the recipe of a training, with every default there is.

A recipe is a flat table. What a user sets comes, in rising precedence, from a recipe (a name in `recipes/` or a YAML
file) and from options; everything else stands here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bnlab.errors import RecipeError, did_you_mean, printable

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Colour = tuple[float, float, float]


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
    data_dependent: bool = False
    """without normalisation: scale every layer on the first batch, so that its outputs begin with a mean square of 1"""
    auxiliary: bool = False
    """train GoogLeNet's two auxiliary classifiers beside the main one"""
    auxiliary_weight: Annotated[float, Field(ge=0)] = 0.3
    """what each auxiliary loss counts for beside the main one"""
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """share of the features before the last layer that is dropped; left out: the network's own"""

    size: Annotated[int, Field(ge=32, le=2048)] = 128
    """side of the square the network sees, in pixels"""
    resize: Literal["squash", "crop"] = "crop"
    """how evaluation makes the square: squash (both sides to `size`) or crop (short side, then the centre)"""
    crop_fraction: Annotated[float, Field(ge=0.1, le=1)] = 0.9
    """`crop`: share of the short side that the centre crop keeps"""
    mean: Colour = (0.485, 0.456, 0.406)
    """subtracted from each channel (RGB, in 0..1)"""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """divides each channel after that"""
    crop_area: tuple[Fraction, Fraction] = (0.25, 1.0)
    """training crops a part of the photo of this share of its area, from and to"""
    crop_aspect: tuple[Positive, Positive] = (0.75, 1.3333333333333333)
    """and of this aspect (width to height), from and to"""
    flip: Fraction = 0.5
    """chance that training mirrors a photo left to right"""

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 30
    """how often training goes through all photos"""
    batch_size: Annotated[int, Field(ge=2)] = 32
    """photos to a step, at most; what is left over is spread evenly, so that no last batch is tiny"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd (with Nesterov momentum) or adam"""
    learning_rate: Positive = 0.1
    """the highest learning rate of the schedule"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """`sgd`: its momentum"""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """L2 penalty on the weights of convolutions and linear layers; biases, gamma and beta go without"""
    schedule: Literal["constant", "step", "one-cycle"] = "one-cycle"
    """how the learning rate moves over the steps"""
    warmup: Fraction = 0.2
    """`one-cycle`: share of the steps in which it rises, before it falls to 0 as a cosine"""
    step_every: Annotated[int, Field(ge=1)] = 1500
    """`step`: steps between two falls"""
    step_factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """`step`: what each fall multiplies by"""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """share of the target spread over all classes"""
    patience: Annotated[int, Field(ge=0)] = 0
    """stop after so many epochs without a better validation accuracy (0: never)"""

    val: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """share of the photos held out for validation where DATA is not split yet"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """all randomness follows from it"""
    init: str | None = None
    """classifier file to start from (fine-tuning)"""
    trunk_rate: Fraction = 1.0
    """factor on the learning rate of all but the last layer (and auxiliary heads); 0.1 with `init` unless set"""
    freeze: Literal["none", "stem", "trunk"] = "none"
    """`init`: do not train the stem (before the first Inception block), or the trunk (all but the last layer)"""
    freeze_bn: bool = False
    """`init`: normalise by the file's statistics, in training too, and keep them, gamma and beta as they are"""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """where the network runs"""
    workers: Annotated[int, Field(ge=-1, le=256)] = -1
    """threads that read photos (0: none, -1: as many as suit this machine); they never change a result"""
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
MACHINE_KEYS = frozenset({"device", "workers", "checkpoint_seconds"})
YOURS = "yours"  # the origin of what the user set by an option

# A key that has an effect only beside these values of another.
_ONLY_WITH: Mapping[str, tuple[str, object]] = {
    "momentum": ("optimizer", "sgd"),
    "warmup": ("schedule", "one-cycle"),
    "step_every": ("schedule", "step"),
    "step_factor": ("schedule", "step"),
    "auxiliary_weight": ("auxiliary", True),
    "crop_fraction": ("resize", "crop"),
    "initialisation": ("init", None),
    "data_dependent": ("init", None),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe, and where each key that is no default came from: YOURS, the recipe's name, or "init"."""

    recipe: Recipe
    origin: Mapping[str, str]

    @property
    def own(self) -> frozenset[str]:
        """The keys the user set by options."""
        return frozenset(key for key, origin in self.origin.items() if origin == YOURS)

    @property
    def chosen(self) -> frozenset[str]:
        """The keys the user set, by options or in a recipe of their own."""
        shipped = {*recipe_names(), "init"}
        return frozenset(key for key, origin in self.origin.items() if origin not in shipped)

    def without_effect(self) -> list[str]:
        """A sentence for each of the user's own keys that changes nothing."""
        sentences = []
        for key, (other, value) in _ONLY_WITH.items():
            if key in self.own and getattr(self.recipe, other) != value:
                where = f"a training without {other}" if value is None else f"{other} {str(value).lower()}"
                sentences.append(f"{key} has no effect: it is for {where}")
        return sentences


def recipe_names() -> list[str]:
    """The recipes bnlab ships."""
    return sorted(entry.name.removesuffix(".yaml") for entry in _shipped().iterdir() if entry.name.endswith(".yaml"))


def load_settings(recipe: str | PathLike[str] = "default", options: Mapping[str, Any] | None = None) -> Settings:
    """Resolve a recipe by name or YAML file, with `options` (key to value) on top.

    Raises:
        RecipeError: no such recipe, an unknown key, a value of the wrong kind or out of range.
    """
    values = _read(recipe)
    options = dict(options or {})
    where = {key: f"recipe {printable(recipe)}" for key in values} | dict.fromkeys(options, "the options")
    origin = dict.fromkeys(values, Path(recipe).name) | dict.fromkeys(options, YOURS)
    return Settings(recipe=_validated(values | options, where), origin=origin)


def with_changes(settings: Settings, changes: Mapping[str, Any], origin: str) -> Settings:
    """The settings with some keys changed, validated again.

    Raises:
        RecipeError: an unknown key or a value out of range.
    """
    where = dict.fromkeys(changes, "the options" if origin == YOURS else origin)
    recipe = _validated(settings.recipe.model_dump() | dict(changes), where)
    return Settings(recipe=recipe, origin={**settings.origin, **dict.fromkeys(changes, origin)})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["momentum=0.8", "size=96"]` as a mapping, with values read as YAML."""
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set {printable(text)} is no key=value", "say, for example, --set momentum=0.8")
        if not value.strip():
            raise RecipeError(f"--set {printable(text)} has no value", "say, for example, --set momentum=0.8")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"--set {printable(text)} has a value that is no YAML", "quote it") from error
    return values


def to_yaml(settings: Settings) -> str:
    """The whole recipe as YAML, each key with its meaning, the user's own marked."""
    lines = [
        "# Every setting of this training. In brackets, where it came from: your option or a recipe; else a default."
    ]
    for key, value in settings.recipe.model_dump(mode="json").items():
        text = yaml.safe_dump({key: value}, default_flow_style=True, width=10_000).strip()[1:-1]
        origin = f"({printable(settings.origin[key])}) " if key in settings.origin else ""
        lines.append(f"{text}  # {origin}{Recipe.model_fields[key].description}")
    return "\n".join(lines) + "\n"


def read_recipe_file(path: Path) -> Settings:
    """The settings a run folder holds; keys that are younger than it have their defaults.

    Raises:
        RecipeError: it was changed to something that is no recipe.
    """
    return Settings(recipe=_validated(_read(path), {}), origin={})


def _shipped() -> Any:
    return files("bnlab") / "recipes"


def _read(recipe: str | PathLike[str]) -> dict[str, Any]:
    path = Path(recipe)
    if str(recipe) in recipe_names():
        return _read_yaml((_shipped() / f"{recipe}.yaml").read_text("utf-8"), str(recipe))
    if path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"no recipe is called '{printable(recipe)}'", did_you_mean(str(recipe), recipe_names()))
    try:
        return _read_yaml(path.read_text("utf-8"), str(recipe))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"recipe {printable(recipe)} cannot be read ({reason})", "check the path") from error


def _read_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {printable(name)} is no YAML ({reason})", "mend that line") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {printable(name)} is no table of keys", "write one 'key: value' a line")
    return {str(key): value for key, value in values.items()}


def _validated(values: Mapping[str, Any], where: Mapping[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        place = f" (in {where[key]})" if key in where else ""
        if first["type"] == "extra_forbidden":
            known = did_you_mean(key, sorted(Recipe.model_fields))
            raise RecipeError(f"a recipe has no key '{printable(key)}'{place}", known) from None
        if not key:
            raise RecipeError(str(first["msg"]).removeprefix("Value error, "), "set both ends") from None
        message = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "tuple_type":
            message = f"write it as {list(Recipe.model_fields[key].default)}"
        raise RecipeError(f"{key} cannot be {printable(repr(first['input']))}{place}", message) from None
