"""Writes bnlab/keywords.py, the keyword arguments of the Python API as types, from options.py and recipe.py."""

import json
import types
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator

from bnlab import options
from bnlab.commands.import_weights import PREPROCESSING_KEYS
from bnlab.config import meaning
from bnlab.lab.experiment import SETTABLE
from bnlab.nets.registry import ARCHITECTURE_KEYS
from bnlab.options import Options
from bnlab.recipe import MACHINE_KEYS, Recipe

KEYWORDS = Path(__file__).parents[1] / "src" / "bnlab" / "keywords.py"

# Each function: its options, those that are parameters in its own signature, and the keys of the recipe that it takes.
FUNCTIONS: dict[str, tuple[type[Options], set[str], set[str]]] = {
    "Split": (options.SplitOptions, {"photos", "into"}, set()),
    "Train": (options.TrainOptions, {"data"}, set(Recipe.model_fields)),
    "FindLr": (options.TrainOptions, {"data", "name"}, set(Recipe.model_fields)),
    "Resume": (Options, set(), set(MACHINE_KEYS)),
    "Evaluate": (options.EvaluateOptions, {"classifiers", "data", "name"}, set()),
    "Predict": (options.PredictOptions, {"classifier", "photos"}, set()),
    "ImportWeights": (options.ImportOptions, {"file", "output"}, {*ARCHITECTURE_KEYS, *PREPROCESSING_KEYS}),
    "Study": (options.StudyOptions, {"study"}, set(SETTABLE)),
}


def keywords() -> str:
    """The module: one TypedDict a function. Keys of the recipe are in bases, one for each set of functions."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for key in Recipe.model_fields:
        takers = tuple(name for name, (model, _, keys) in FUNCTIONS.items() if key in keys - {*model.model_fields})
        groups.setdefault(takers, []).append(key)
    lines = [
        '"""The keyword arguments of the functions in api.py, for type checkers and editors.\n',
        "`make docs` writes this file from options.py and recipe.py.",
        '"""\n',
        "from os import PathLike",
        "from typing import Literal, TypedDict",
    ]
    for takers, keys in groups.items():
        lines += ["", "", f"class {_base(takers)}(TypedDict, total=False):", *_body(Recipe, keys)]
    for name, (model, own, _) in FUNCTIONS.items():
        bases = [_base(takers) for takers in groups if name in takers] or ["TypedDict"]
        body = list(_body(model, [key for key in model.fields() if key not in own | {"recipe_keys"}])) or ["    pass"]
        head = f"class {name}({', '.join(bases)}, total=False):"
        if len(head) > 120:
            head = "\n".join([f"class {name}(", *(f"    {base}," for base in bases), "    total=False,", "):"])
        lines += ["", "", head, *body]
    return "\n".join(lines) + "\n"


def _base(takers: tuple[str, ...]) -> str:
    return "_" + "And".join(name for name in takers if name != "FindLr")  # which takes all that Train does


def _body(model: type[BaseModel], keys: list[str]) -> Iterator[str]:
    for key in keys:
        field = model.model_fields[key]
        yield f"    {key}: {_source(field.annotation, field.metadata)}"
        text = meaning(model, key)
        yield from wrap(f'"""{text}"""', 120, initial_indent="    ", subsequent_indent="    ")


def _source(annotation: Any, metadata: Any = ()) -> str:
    """A type as source code: what a field takes, where a validator converts it."""
    for each in metadata:
        if isinstance(each, BeforeValidator):
            hints = get_type_hints(each.func)
            return _source(next(iter(hints.values())))
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _source(arguments[0], arguments[1:])
    if origin in (Union, types.UnionType):
        return " | ".join(_source(argument) for argument in arguments)
    if origin is Literal:
        return f"Literal[{', '.join(json.dumps(argument) for argument in arguments)}]"
    if origin is not None:
        return f"{origin.__name__}[{', '.join(_source(argument) for argument in arguments)}]"
    if annotation is Path:
        return "str | PathLike[str]"
    return "None" if annotation is type(None) else str(annotation.__name__)
