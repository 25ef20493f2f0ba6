"""Settings: the recipe of a training, and where each part of it came from.

A recipe is a flat table. What a user sets comes, in rising precedence, from a recipe (a name in `recipes/` or a YAML
file) and from options; everything else is a default of recipe.py.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from bnlab.errors import RecipeError, did_you_mean, printable
from bnlab.recipe import ONLY_WITH, Recipe

YOURS = "yours"  # the origin of what the user set by an option


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe, and where each key that is no default came from: YOURS, the recipe's name, or what it followed from
    ("init", "machine", "time")."""

    recipe: Recipe
    origin: Mapping[str, str]

    @property
    def own(self) -> frozenset[str]:
        """The keys the user set by options."""
        return frozenset(key for key, origin in self.origin.items() if origin == YOURS)

    @property
    def chosen(self) -> frozenset[str]:
        """The keys the user set, by options or in a recipe of their own."""
        shipped = {*recipe_names(), "init", "machine", "time"}
        return frozenset(key for key, origin in self.origin.items() if origin not in shipped)

    def without_effect(self) -> list[str]:
        """A sentence for each of the user's own keys that changes nothing."""
        sentences = []
        for key, (other, value) in ONLY_WITH.items():
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
            raise RecipeError(f"--set {printable(text)} is no key=value", "say, for example, --set epochs=20")
        if not value.strip():
            raise RecipeError(f"--set {printable(text)} has no value", "say, for example, --set epochs=20")
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
        meaning = " ".join(str(Recipe.model_fields[key].description).split())
        lines.append(f"{text}  # {origin}{meaning}")
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
