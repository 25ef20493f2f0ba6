"""Options of the verbs: validated, with a whole sentence of help each."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from bnlab import options
from bnlab.errors import RecipeError, UsageError
from bnlab.options import EvaluateOptions, NetOptions, Options, SplitOptions
from bnlab.recipe import Recipe

MODELS = [
    model for model in vars(options).values() if isinstance(model, type) and issubclass(model, Options)
]  # also the private bases


def test_every_field_means_something_in_a_whole_sentence() -> None:
    fields = [(m, name, field) for m in (*MODELS, Recipe) for name, field in m.model_fields.items()]
    assert len(fields) > 100
    for model, name, field in fields:
        text = str(field.description)
        assert text[0].isupper(), (model, name)
        assert text.endswith("."), (model, name)
        assert len(text.split()) >= 3, (model, name)


@pytest.mark.parametrize("model", [m for m in MODELS if not m.__name__.startswith("_") and m is not Options])
def test_help_begins_with_the_options_of_the_verb(model: type[Options]) -> None:
    names = list(model.fields())
    assert sorted(names) == sorted(model.model_fields)
    own = [name for name in names if name in model.__annotations__]
    assert names[: len(own)] == own


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"val": 2}, ["val is 2", "less than or equal to 1"]),
        ({"how": "move"}, ["how is 'move'", "'link', 'copy' or 'list'"]),
        ({"seed": "x"}, ["seed is 'x'", "valid integer"]),
        ({"vall": 0.1}, ["no key 'vall'", "did you mean 'val'?"]),
    ],
)
def test_what_is_not_valid_is_named_with_the_remedy(changes: dict[str, object], fragments: list[str]) -> None:
    with pytest.raises(UsageError) as error:
        SplitOptions(**{"photos": Path("a"), "into": Path("b")} | changes)
    for fragment in fragments:
        assert fragment in str(error.value)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(UsageError, match="no photos: pass photos"):
        SplitOptions(into=Path("b"))
    with pytest.raises(UsageError, match="classifiers"):
        EvaluateOptions(classifiers=[], data=Path("b"))


def test_recipe_keys_are_assignments_or_a_mapping() -> None:
    assert NetOptions(recipe_keys=["width=0.5"]) == NetOptions(recipe_keys={"width": 0.5})
    assert NetOptions(recipe_keys=None) == NetOptions()
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        NetOptions(recipe_keys=["width"])


def test_options_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        NetOptions().size = 3
    assert issubclass(Options, BaseModel)
