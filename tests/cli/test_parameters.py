"""Fields of the options become parameters of the command line with their help, range and default."""

import inspect
from typing import Annotated, Any, get_args

import pytest
import typer
from pydantic import Field

from bnlab.cli.parameters import takes
from bnlab.options import API_ONLY, Options, RecipeKeys


class Example(Options):
    file: Annotated[str, typer.Argument(metavar="FILE")]
    """File to read."""
    batch_size: Annotated[int, Field(ge=1, le=9)] = 3
    """Number of photos
    at a time."""
    name: str | None = None
    """Name."""
    recipe_keys: RecipeKeys = {}  # noqa: RUF012 (pydantic copies it)
    """Keys."""
    hidden: Annotated[int, API_ONLY] = 5
    """Not on the command line."""


def parameters(**how: Any) -> dict[str, inspect.Parameter]:
    @takes(Example, **how)
    def verb(*, as_json: bool = False, **given: Any) -> None: ...

    return dict(inspect.signature(verb).parameters)


def test_fields_become_parameters_in_front_of_the_verbs_own() -> None:
    found = parameters()
    assert list(found) == ["file", "batch_size", "name", "recipe_keys", "as_json"]
    assert found["file"].default is inspect.Parameter.empty
    kind, info = get_args(found["batch_size"].annotation)
    assert (kind, found["batch_size"].default) == (int, 3)
    assert (info.help, info.min, info.max, info.default) == ("Number of photos at a time.", 1, 9, "--batch-size")
    assert get_args(found["recipe_keys"].annotation)[1].default == "--set"


def test_keys_of_the_recipe_can_be_added() -> None:
    found = parameters(recipe_options=["epochs", "time", "freeze_bn"])
    assert list(found) == ["file", "batch_size", "name", "epochs", "time", "freeze_bn", "recipe_keys", "as_json"]
    kind, info = get_args(found["epochs"].annotation)
    assert (kind, found["epochs"].default, info.show_default) == (int | None, None, "30")
    assert get_args(found["time"].annotation)[0] == str | None  # the recipe reads the time span


@pytest.mark.parametrize("field", ["file", "batch_size"])
def test_a_shared_definition_is_not_changed(field: str) -> None:
    first, second = parameters(), parameters()
    assert get_args(first[field].annotation)[1] is not get_args(second[field].annotation)[1]
