"""Signatures and docstrings of the Python API, made from options.py and recipe.py when it is imported.

Type checkers and editors do not see these: they read keywords.py, which docs/generate.py makes from the same fields.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from textwrap import TextWrapper
from typing import Any, TypeVar

from bnlab.config import meaning
from bnlab.options import Options
from bnlab.recipe import Recipe

F = TypeVar("F", bound=Callable[..., object])
_PROGRESS = "Object that receives progress, notes and warnings (default: none; the logger `bnlab` gets the last two)."


def takes(options: type[Options], keys: type) -> Callable[[F], F]:
    """Give a function `keys`, of keywords.py, as keyword arguments: in its signature, and in its docstring.

    They are fields of `options` or else of the recipe, which have their defaults and meanings. So have the function's
    own parameters that its docstring does not describe.
    """

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        listed = [parameter for name, parameter in signature.parameters.items() if name != "options"]
        for name in dict.fromkeys((*options.fields(), *Recipe.model_fields)):
            if name in keys.__annotations__:
                default, kind = _model(options, name).model_fields[name].default, inspect.Parameter.KEYWORD_ONLY
                listed.append(inspect.Parameter(name, kind, default=default, annotation=keys.__annotations__[name]))
        function.__signature__ = signature.replace(parameters=listed)  # type: ignore[attr-defined]

        begin, _, rest = (inspect.getdoc(function) or "").partition("Args:\n")
        written, _, end = f"\n{rest}".partition("\n\n")
        filled = TextWrapper(110, initial_indent=" " * 4, subsequent_indent=" " * 8).fill
        blocks = re.split(r"\n(?=    \w)", written)[1:]
        lines = {block.split(":")[0].strip(): block for block in blocks}
        lines |= {"progress": filled(f"progress: {_PROGRESS}")}
        for name in (parameter.name for parameter in listed):
            lines[name] = lines.pop(name, None) or filled(f"{name}: {meaning(_model(options, name), name)}")
        function.__doc__ = begin + "\n".join(["Args:", *lines.values()]) + "\n\n" + end
        return function

    return decorate


def _model(options: type[Options], name: str) -> type[Options] | type[Recipe]:
    return options if name in options.model_fields else Recipe


def as_fields(options: type[Options], given: Mapping[str, object]) -> dict[str, Any]:
    """The given arguments as fields of `options`; if it has `recipe_keys`, the others are keys of the recipe."""
    if "recipe_keys" not in options.model_fields:
        return dict(given)
    fields = {name: value for name, value in given.items() if name in options.model_fields and name != "recipe_keys"}
    return fields | {"recipe_keys": {name: value for name, value in given.items() if name not in fields}}
