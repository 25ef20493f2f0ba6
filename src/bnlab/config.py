"""The settings of a training: a recipe, and where each of its values came from.

A recipe is a flat table. A value comes from an option, else from the chosen recipe (a name in `recipes/` or a YAML
file), else from the defaults in recipe.py.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from bnlab import no_effect
from bnlab.errors import RecipeError, did_you_mean, plural, printable
from bnlab.recipe import Recipe

YOURS = "yours"  # the origin of what the user set by an option
_SHIPPED = files("bnlab") / "recipes"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A recipe, and the origin of each key that is not a default: YOURS, the recipe's name, or what the value follows
    from ("init", "machine", "time")."""

    recipe: Recipe
    origin: Mapping[str, str]

    @property
    def own(self) -> frozenset[str]:
        """The keys the user set by options."""
        return frozenset(key for key, origin in self.origin.items() if origin == YOURS)

    @property
    def chosen(self) -> frozenset[str]:
        """The keys the user set, by options or in a recipe file."""
        shipped = {*recipe_names(), "init", "machine", "time"}
        return frozenset(key for key, origin in self.origin.items() if origin not in shipped)

    def without_effect(self) -> list[str]:
        """A sentence for each key in `own` that changes nothing, as far as the recipe alone tells."""
        own = no_effect.turned_on(self.recipe, self.own)
        return list(no_effect.sentences(no_effect.RECIPE_RULES, self.recipe, own).values())


def recipe_names() -> list[str]:
    return sorted(entry.name.removesuffix(".yaml") for entry in _SHIPPED.iterdir() if entry.name.endswith(".yaml"))


def load_settings(recipe: str | PathLike[str] = "default", options: Mapping[str, Any] | None = None) -> Settings:
    """Read a recipe by name or from a YAML file, and set `options` (key to value) on top.

    Raises:
        RecipeError: the recipe does not exist, a key is unknown, or a value has the wrong type or is out of range.
    """
    values = _read(recipe)
    options = dict(options or {})
    if options.keys() & {"epochs", "steps", "time", "validate_every"}:
        made = values.pop("plan", None)  # of a training that was made; the user asks for another one
        if made and options.keys() & {"epochs", "time"}:
            values.pop("steps", None)
    where = {key: f"recipe {printable(recipe)}" for key in values} | dict.fromkeys(options, "the options")
    origin = dict.fromkeys(values, Path(recipe).name) | dict.fromkeys(options, YOURS)
    result = _validated(values | options, where)
    if "plan" in values and result.plan and result.steps not in (0, end := result.plan[-1][1]):
        what = f"recipe {printable(recipe)} has {plural(result.steps, 'step')}, and a plan of {end}"
        raise RecipeError(what, "delete its line plan, or pass steps=NUMBER")
    return Settings(recipe=result, origin=origin)


def with_changes(settings: Settings, changes: Mapping[str, Any], origin: str) -> Settings:
    """The settings with some keys changed, validated again.

    Raises:
        RecipeError: a key is unknown, or a value is out of range.
    """
    where = dict.fromkeys(changes, "the options" if origin == YOURS else origin)
    recipe = _validated(settings.recipe.model_dump() | dict(changes), where)
    return Settings(recipe=recipe, origin={**settings.origin, **dict.fromkeys(changes, origin)})


def parse_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """`["momentum=0.8", "size=96"]` as a mapping, with values read as YAML.

    Raises:
        RecipeError: a text is not KEY=VALUE, or its value is not YAML.
    """
    values: dict[str, Any] = {}
    for text in assignments:
        key, equals, value = text.partition("=")
        if not key.strip() or not value.strip():
            fault = "has no value" if key.strip() and equals else "is not KEY=VALUE"
            raise RecipeError(f"--set {printable(text)} {fault}", "write it like --set epochs=20")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(f"the value of --set {printable(text)} is not YAML", "quote the value") from error
    return values


def to_yaml(settings: Settings) -> str:
    """The recipe as YAML, each key with its origin and its meaning."""
    lines = ["# Every setting of this training. In brackets: its origin, if it is not the default."]
    return "\n".join([*lines, *_yaml_lines(settings).values()]) + "\n"


def with_lines_of(text: str, settings: Settings, keys: Collection[str]) -> str:
    """The text of a recipe file, with the lines of these keys as `to_yaml` writes them. All other lines stay."""
    new = {key: line for key, line in _yaml_lines(settings).items() if key in keys}
    lines = [new.pop(line.partition(":")[0].rstrip(), line) for line in text.splitlines()]
    return "\n".join([*lines, *new.values()]) + "\n"


def _yaml_lines(settings: Settings) -> dict[str, str]:
    """For each key its line in a recipe file, with its value, its origin and its meaning."""
    lines = {}
    for key, value in settings.recipe.model_dump(mode="json").items():
        text = yaml.safe_dump({key: value}, default_flow_style=True, width=10_000).strip()[1:-1]
        origin = f"({printable(settings.origin[key])}) " if key in settings.origin else ""
        lines[key] = f"{text}  # {origin}{meaning(Recipe, key)}"
    return lines


def meaning(model: type[BaseModel], key: str) -> str:
    """What a field means, on one line: the text that stands below it in the source."""
    return " ".join(str(model.model_fields[key].description).split())


def read_recipe_file(path: Path) -> Settings:
    """The settings in a run folder; a key that the file does not have has its default.

    Raises:
        RecipeError: the file is not a valid recipe.
    """
    return Settings(recipe=_validated(_read(path), {}), origin={})


def explain(error: ValidationError, model: type[BaseModel], what: str, where: Mapping[str, str]) -> tuple[str, str]:
    """The first fault that pydantic found, as problem and remedy. `where` gives the place that a key was set in."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    place = f" (in {where[key]})" if key in where else ""
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"{what} has no key '{printable(key)}'{place}", did_you_mean(key, sorted(model.model_fields))
    if first["type"] == "missing":
        return f"{what} has no {key}", f"pass {key}"
    if not key:
        return message, "set both ends"
    if first["type"] == "tuple_type":
        message = f"write it as {list(model.model_fields[key].default)}"
    return f"{key} is {printable(repr(first['input']))}{place}", message.replace("Input should", "it must")


def _read(recipe: str | PathLike[str]) -> dict[str, Any]:
    name, path = printable(recipe), Path(recipe)
    shipped = str(recipe) in recipe_names()
    if not shipped and path.suffix not in (".yaml", ".yml"):
        raise RecipeError(f"no recipe is called '{name}'", did_you_mean(str(recipe), recipe_names()))
    try:
        values = yaml.safe_load((_SHIPPED / f"{recipe}.yaml" if shipped else path).read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"recipe {name} cannot be read ({reason})", "check the path") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(f"recipe {name} is not YAML ({reason})", "fix that line") from error
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {name} is not a table of keys", "write one 'key: value' a line")
    return {str(key): value for key, value in values.items()}


def _validated(values: Mapping[str, Any], where: Mapping[str, str]) -> Recipe:
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(*explain(error, Recipe, "a recipe", where)) from None
