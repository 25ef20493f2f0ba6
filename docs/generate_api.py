"""Writes bnlab/keywords.py, the keyword arguments of the Python API as types, and the page of the API, api.md."""

import ast
import inspect
import json
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from textwrap import dedent, wrap
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, BeforeValidator

import bnlab
from bnlab import errors, options
from bnlab.commands.import_weights import PREPROCESSING_KEYS
from bnlab.config import meaning
from bnlab.lab.experiment import SETTABLE
from bnlab.nets.registry import ARCHITECTURE_KEYS
from bnlab.options import Options
from bnlab.recipe import LENGTH_KEYS, MACHINE_KEYS, Recipe

KEYWORDS = Path(__file__).parents[1] / "src" / "bnlab" / "keywords.py"

# Each function: its options, those that are parameters in its own signature, and the keys of the recipe that it takes.
FUNCTIONS: dict[str, tuple[type[Options], set[str], set[str]]] = {
    "Split": (options.SplitOptions, {"photos", "into"}, set()),
    "Train": (options.TrainOptions, {"data"}, set(Recipe.model_fields)),
    "FindLr": (options.TrainOptions, {"data", "name"}, set(Recipe.model_fields)),
    "Resume": (Options, set(), {*MACHINE_KEYS, *LENGTH_KEYS}),
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


# The page.

_INTRODUCTION = """\
# Python

`make docs` writes this page from the docstrings. Everything on it can be imported from `bnlab`; `help(bnlab.train)`
and the completion of an editor show the same. Its examples run one after the other, in a folder with the photos
`flowers/CLASS/*.png` and `tulip.jpg`.

`import bnlab` takes no time: torch is imported by the first function that needs it. Arguments have types for mypy and
editors (`bnlab/keywords.py`); at run time, a name or a value that is not valid raises a UsageError with the remedy.

**Warnings.** A function prints nothing. What it warns of, such as photos that were left out or trained on, is in the
`warnings` of its result, and `refused` has each photo that could not be used, with the reason. The logger `bnlab` gets
warnings at the level WARNING and notes, such as a line for each epoch, at the level INFO; unless logging is configured,
Python prints the warnings to stderr.

```python
>>> import logging
>>> logging.getLogger("bnlab").setLevel(logging.ERROR)  # no warnings

```

`progress` takes an object with the methods of `bnlab.Progress`, for bars in a notebook, for example.

**Speed.** `bnlab.tune_allocator()`, called before torch is imported, makes training on a CPU faster
([training.md](training.md)). It changes how the whole process allocates memory, and is not undone. That is for the
program to decide, so only the command line calls it by itself.
"""
_FUNCTIONS = ("split", "train", "resume", "find_lr", "evaluate", "predict", "import_weights", "study", "tune_allocator")
_CLASSES = ("Classifier", "Ensemble", "Prediction", "Candidate", "Evaluation", "Refusal", "Progress")
_RESULTS = (
    *("SplitResult", "TrainingResult", "FindLrResult", "EvaluateResult", "PredictResult", "ImportResult"),
    "StudyResult",
)


def api() -> str:
    parts = [_INTRODUCTION, "## Functions\n"]
    for name in _FUNCTIONS:
        parts += [f"### `{name}`\n", *_described(name, getattr(bnlab, name))]
    parts.append("## Classes\n")
    for name in _CLASSES:
        parts += _class(name)
    parts.append("## Results\n")
    parts.append("Each has `warnings` (texts), `refused` (`Refusal`s) and `to_json()`, the document of `--json`.\n")
    for name in _RESULTS:
        parts += _class(name)
    parts.append("## Errors\n")
    parts.append("All are in `bnlab.errors`, too. Each has a `problem` (what is wrong, and where) and a `remedy`.\n")
    for name, error in vars(errors).items():
        if isinstance(error, type) and error.__module__ == errors.__name__:
            parts.append(f"- `{name}({error.__bases__[0].__name__})`: {' '.join(_doc(error).split())}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)) + "\n"


def _doc(thing: object) -> str:
    text = inspect.getdoc(thing) or ""
    return "" if text.startswith(f"{getattr(thing, '__name__', '')}(") else text  # which a dataclass makes itself


def _described(name: str, function: Callable[..., object]) -> Iterator[str]:
    """Signature and docstring as Markdown; the keys of the recipe, which recipes.md describes, are named only."""
    taken = next((FUNCTIONS[key][2] for key in FUNCTIONS if _snake(key) == name), set())
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
    keys = [p.name for p in parameters if p.name in taken and p.name not in _options_of(name)]
    shown = [_parameter(p) for p in parameters if p.name not in keys] + ["**keys"] * bool(keys)
    positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
    if positional < len(parameters):
        shown.insert(positional, "*")
    yield from ["```text", *wrap(f"{name}({', '.join(shown)})", 116, subsequent_indent="    "), "```", ""]
    for title, lines in _sections(_doc(function)):
        if title == "":
            yield from [*_examples(lines), ""]
            continue
        if title == "Returns":
            yield from [" ".join(["**Returns:**", *(line.strip() for line in lines)]), ""]
            continue
        entries = [entry for entry in _entries(lines) if entry.split(":")[0] not in keys]
        if keys and title == "Args":
            entries.append(f"keys: keys of the recipe ([recipes.md](recipes.md)): {', '.join(keys)}.")
        yield from [f"**{'Arguments' if title == 'Args' else title}:**", ""]
        yield from (f"- `{entry.split(': ')[0]}`: {entry.split(': ', 1)[-1]}" for entry in entries)
        yield ""


def _snake(name: str) -> str:
    return re.sub(r"(?<=.)([A-Z])", r"_\1", name).lower()


def _options_of(name: str) -> set[str]:
    return next((set(model.model_fields) for key, (model, _, _) in FUNCTIONS.items() if _snake(key) == name), set())


def _parameter(parameter: inspect.Parameter) -> str:
    default = parameter.default
    if default is parameter.empty:
        return parameter.name
    return f"{parameter.name}={str(default)!r}" if isinstance(default, Path) else f"{parameter.name}={default!r}"


def _sections(text: str) -> Iterator[tuple[str, list[str]]]:
    title, lines = "", []
    for line in text.splitlines():
        if re.fullmatch("(Args|Returns|Raises):", line):
            yield title, lines
            title, lines = line[:-1], []
        else:
            lines.append(line)
    yield title, lines


def _entries(lines: list[str]) -> list[str]:
    joined = re.split(r"\n(?=\S)", dedent("\n".join(lines)).strip())
    return [" ".join(entry.split()) for entry in joined if entry]


def _examples(lines: list[str]) -> Iterator[str]:
    """The paragraphs of a docstring; an example becomes a block, with a blank line that ends its output."""
    for paragraph in "\n".join(lines).strip().split("\n\n"):
        block = paragraph.startswith(">>>")
        yield from ["```python", paragraph, "", "```", ""] if block else [paragraph, ""]


def _class(name: str) -> Iterator[str]:
    kind = getattr(bnlab, name)
    yield from [f"### `{name}`\n", *_examples(_doc(kind).splitlines())]
    for key, text in _attributes(kind).items():
        yield f"- `{key}`" + f": {text}" * bool(text)
    yield ""
    if is_dataclass(kind):
        return
    for key, member in vars(kind).items():
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and not key.startswith("_"):
            yield from [f"#### `{name}.{key}`\n", *_described(key, function)]


def _attributes(kind: type) -> dict[str, str]:
    """The fields and properties of a class, each with the text below it in the source."""
    found = {}
    body = ast.parse(dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            found[f"{node.target.id}: {ast.unparse(node.annotation)}"] = " ".join(str(text).split())
        elif isinstance(node, ast.FunctionDef) and node.returns is not None and node.name[0] != "_":
            decorators = {ast.unparse(each) for each in node.decorator_list}
            if decorators & {"property", "cached_property"}:
                found[f"{node.name}: {ast.unparse(node.returns)}"] = " ".join((ast.get_docstring(node) or "").split())
    return found
