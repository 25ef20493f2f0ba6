import inspect

import pytest

import bnlab
from bnlab.errors import RecipeError, UsageError
from bnlab.options import (
    EvaluateOptions,
    ImportOptions,
    Options,
    PredictOptions,
    SplitOptions,
    StudyOptions,
    TrainOptions,
)
from bnlab.recipe import Recipe
from bnlab.signatures import as_fields

FUNCTIONS = {
    bnlab.split: (SplitOptions, ["photos", "into"], None),
    bnlab.train: (TrainOptions, ["data"], "epochs"),
    bnlab.find_lr: (TrainOptions, ["data"], "epochs"),
    bnlab.resume: (Options, ["name"], "workers"),
    bnlab.evaluate: (EvaluateOptions, ["classifier", "data"], None),
    bnlab.predict: (PredictOptions, ["classifier", "photos"], None),
    bnlab.import_weights: (ImportOptions, ["file", "output"], "width"),
    bnlab.study: (StudyOptions, ["study"], "steps"),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_signature_and_help_are_those_of_the_options_and_the_recipe(function: object) -> None:
    options, positional, recipe_key = FUNCTIONS[function]  # type: ignore[index]
    signature, text = inspect.signature(function), inspect.getdoc(function)  # type: ignore[arg-type]
    kinds = [p.kind for p in signature.parameters.values()]
    assert [name for name, p in signature.parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert set(kinds) == {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    for name in signature.parameters:
        assert str(text).count(f"\n    {name}: ") == 1, name
    for name, field in options.model_fields.items():
        assert name in signature.parameters or name in ("recipe_keys", "classifiers")
        if not field.is_required() and name not in ("data", "recipe_keys"):
            assert signature.parameters[name].default == field.default
    if recipe_key:
        assert "Annotated" not in str(signature)
        assert signature.parameters[recipe_key].default == Recipe.model_fields[recipe_key].default
    for section in ("\n\nArgs:\n    ", "\n\nReturns:\n", "\n\nRaises:\n", "\n>>> from bnlab import"):
        assert section in str(text), section


def test_arguments_are_fields_or_keys_of_the_recipe() -> None:
    assert as_fields(SplitOptions, {"val": 0.1, "x": 1}) == {"val": 0.1, "x": 1}
    found = as_fields(TrainOptions, {"strict": True, "epochs": 2, "recipe_keys": {}})
    assert found == {"strict": True, "recipe_keys": {"epochs": 2, "recipe_keys": {}}}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: bnlab.split("a", "b", vall=0.2), UsageError, "no key 'vall': did you mean 'val'"),
        (lambda: bnlab.train("a", epoch=3), RecipeError, r"no key 'epoch'.*did you mean 'epochs'"),
        (lambda: bnlab.find_lr("a", siz=3), RecipeError, r"no key 'siz'.*did you mean 'size'"),
        (lambda: bnlab.train("a", recipe_keys={"epochs": 3}), RecipeError, "no key 'recipe_keys'"),
        (lambda: bnlab.resume(size=32), UsageError, "a resume cannot change 'size': leave size out"),
        (lambda: bnlab.resume(recipe="classic"), UsageError, "a resume cannot change 'recipe'"),
        (lambda: bnlab.resume(devic="cpu"), UsageError, "did you mean 'device'"),
        (lambda: bnlab.import_weights("a", "b.safetensors", widt=1), UsageError, "did you mean 'width'"),
        (lambda: bnlab.study("placement", step=1), UsageError, "no key 'step': did you mean 'steps'"),
        (lambda: bnlab.study("placment"), UsageError, "did you mean 'placement'"),
    ],
)
def test_wrong_names_get_the_nearest_one(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()  # type: ignore[operator]
