"""A digest of the code that the result of a function follows from.

It covers the definitions whose names occur in the function, those whose names occur in these, and so on through bnlab,
and of each module on the way what it does when it is imported. A change in a plot, in a command or in another study
leaves the digest as it is. So do comments, docstrings, line breaks and the texts of errors. Names in annotations count,
so the classes of a function's arguments are covered. Other packages are not covered: their versions stand for them.
"""

import ast
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_SOURCE = Path(__file__).parents[1]
_ALL = "*"  # stands for all names of a module
_EFFECTS = ""  # stands for the statements that define no name


class _Use(NamedTuple):
    """A name of a module that occurs in a statement."""

    module: str
    name: str
    attribute: str = ""
    """of an imported name, which may be a module"""


@cache
def code_digest(*functions: Callable[..., object], source: Path = _SOURCE) -> str:
    """The digest for functions of bnlab, whose folder is `source`, in hexadecimal."""
    code: dict[tuple[str, str], str] = {}
    pending = {_Use(function.__module__, function.__qualname__) for function in functions}
    seen: set[_Use] = set()
    while pending:
        use = pending.pop()
        seen.add(use)
        module = _module(use.module, source)
        if module is None:  # of another package
            continue
        used: set[_Use] = set()
        if use.name == _ALL:
            used = {_Use(use.module, name) for name in ([use.attribute] if use.attribute else module.names)}
        elif use.name in module.imports:
            used = {_Use(*module.imports[use.name], use.attribute)}
        elif use.name not in module.definitions:  # it is a module of this package
            used = {_Use(f"{use.module}.{use.name}", _ALL, use.attribute)}
        for name in (use.name, _EFFECTS):
            if (use.module, name) not in code:
                code[use.module, name], more = module.read(name)
                used |= more
        pending |= used - seen
    return hashlib.sha256(repr(sorted(code.items())).encode()).hexdigest()


class _Module:
    """The statements of a module, by the names that they define, and where the names that it imports come from."""

    def __init__(self, name: str, text: bytes) -> None:
        self.name = name
        self.definitions: dict[str, list[ast.stmt]] = defaultdict(list)
        self.imports: dict[str, tuple[str, str]] = {}
        tree = ast.parse(text)
        for statement in tree.body:
            if not isinstance(statement, ast.Import | ast.ImportFrom) and not _is_text(statement):
                for defined in list(_defined_by(statement)) or [_EFFECTS]:
                    self.definitions[defined].append(statement)
        for node in ast.walk(tree):  # imports within functions too
            if isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: (node.module or "", alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                self.imports |= {alias.asname or alias.name: (alias.name, _ALL) for alias in node.names}
        self.names = (set(self.definitions) | set(self.imports)) - {_EFFECTS}

    def read(self, name: str) -> tuple[str, set[_Use]]:
        """The code that defines a name, without docstrings and texts of errors, and the names that it uses."""
        statements = self.definitions.get(name, [])
        nodes = [node for statement in statements for node in ast.walk(statement)]
        attributes = {id(node.value): node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used = {
            _Use(self.name, node.id, attributes.get(id(node), "") if node.id in self.imports else "")
            for node in nodes
            if isinstance(node, ast.Name) and node.id in self.names
        }
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                node.body = [statement for statement in node.body if not _is_text(statement)]
            elif isinstance(node, ast.Raise):
                for part in ast.walk(node):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        part.value = ""
        return "\n".join(map(ast.dump, statements)), used


@cache
def _module(name: str, source: Path) -> _Module | None:
    package, *parts = name.split(".")
    path = source.joinpath(*parts)
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if package == "bnlab" and file.is_file():
            return _Module(name, file.read_bytes())
    return None


def _defined_by(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        yield statement.name
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    for target in targets:
        parts = target.elts if isinstance(target, ast.Tuple) else [target]
        yield from (part.id for part in parts if isinstance(part, ast.Name))


def _is_text(statement: ast.stmt) -> bool:
    """Whether it is a docstring, or a text below an attribute."""
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
