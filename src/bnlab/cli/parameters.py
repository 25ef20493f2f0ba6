"""Turns the fields of bnlab/options.py and of the recipe into parameters that Typer understands."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator
from typer.models import OptionInfo, ParameterInfo

from bnlab.config import meaning
from bnlab.options import API_ONLY, Options
from bnlab.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
F = TypeVar("F", bound=Callable[..., None])


def takes(
    options: type[Options], *, recipe_options: Sequence[str] = (), optional: Sequence[str] = ()
) -> Callable[[F], F]:
    """Give a verb the fields of `options` as arguments and options, which it receives as `**given`.

    Args:
        options: the model; fields marked API_ONLY are left out.
        recipe_options: keys of the recipe that have an option apart from `--set`; None if not given.
        optional: required fields that the verb can do without; None if not given.
    """

    def decorate(verb: F) -> F:
        parameters = []
        for name, field in options.fields().items():
            if name == "recipe_keys":
                parameters += [_parameter(Recipe, key, optional=True) for key in recipe_options]
            if API_ONLY not in field.metadata:
                parameters.append(_parameter(options, name, optional=name in optional))
        signature = inspect.signature(verb)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        verb.__signature__ = signature.replace(parameters=[*parameters, *own])  # type: ignore[attr-defined]
        return verb

    return decorate


def _parameter(model: type[BaseModel], name: str, *, optional: bool = False) -> inspect.Parameter:
    """A field as a parameter with its help, range and default. An `optional` one is None if it is not given."""
    field = model.model_fields[name]
    kind = _type(field.annotation, field.metadata)
    given = next((m for m in field.metadata if isinstance(m, ParameterInfo)), typer.Option())
    info: ParameterInfo = copy(given)
    info.help = meaning(model, name)
    if isinstance(info, OptionInfo) and info.default is ...:  # `...`: it does not have a flag such as "--set" yet
        info.default = f"--{name.replace('_', '-')}"
    info.min = next((m.ge for m in field.metadata if hasattr(m, "ge")), None)
    info.max = next((m.le for m in field.metadata if hasattr(m, "le")), None)
    default = inspect.Parameter.empty if field.is_required() else field.default
    if optional:
        known = default is not None and default is not inspect.Parameter.empty and kind is not bool
        info.show_default = str(default) if known else False
        default = None
    if default is None or kind == list[str]:
        kind, default = kind | None, None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _type(annotation: Any, metadata: Sequence[object]) -> Any:
    """The type that Typer converts a word to; what a validator of the field converts remains text."""
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is Annotated:
        annotation, *metadata = get_args(annotation)
    if get_origin(annotation) is Mapping:
        return list[str]
    return str if any(isinstance(m, BeforeValidator) for m in metadata) else annotation
