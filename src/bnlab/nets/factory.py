"""Build a network of the caller's own from a spec: PATH.py:NAME or package.module:NAME. This runs the caller's code."""

import importlib
import importlib.machinery
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from bnlab.errors import UsageError, did_you_mean, plural, printable

_FORMS = "PATH.py:NAME or package.module:NAME"
_NEVER_HIDDEN = {"bnlab", "numpy", "torch"}  # a second copy of these cannot work beside the first
_LONGEST = 200  # characters of a message of the caller's code
_MOST_NAMED = 10


def build_model(spec: str) -> nn.Module:
    """Import the caller's code, call what the spec names there without arguments, and return the network.

    This runs code: the whole file or module, whatever it imports, and the function. Pass only a spec of code that you
    trust. The network is returned as it was made: in its mode, on its device.

    The spec is one of two:

    - "PATH.py:NAME". While the code runs, the file's folder is first on sys.path, so that the file can import its
      neighbours, as `python PATH.py` can. A file that is loaded already is not run again.
    - "package.module:NAME", a module from the working folder or an installed one.

    NAME is a function, a class or a ready nn.Module, and may be dotted: "Net", "nets.make", "models.resnet18".

    Afterwards sys.path is as it was. Modules that the code imported stay loaded, so that the network can be copied,
    pickled and run; the file itself stays under its own name, or under NAME_ and a hash of its path where another
    module has that name. Modules from the folder that hide an installed module are unloaded.

    Raises:
        UsageError: the spec is not valid, there is no such file, module or name, the code fails, what it names needs
            arguments, or it does not return an nn.Module with tensors that exist and can change.
    """
    place, _, name = spec.rpartition(":")
    shown = printable(spec)
    if not place or not name:
        file = shown.rstrip(":")
        remedy = f"name the function that makes the network: {file}:NAME" if file.endswith(".py") else f"pass {_FORMS}"
        raise UsageError(f"'{shown}' does not say which network to build", remedy)
    if not all(part.isidentifier() for part in name.split(".")):
        raise UsageError(f"'{printable(name)}' in '{shown}' is not a name in Python", f"pass {_FORMS}")
    path = _checked_path(place) if _is_file(place) else None
    folder = path.parent if path else Path.cwd()
    with _importable(folder):
        try:
            module = _import_file(path) if path else importlib.import_module(place)
            value = _find(module, name, shown)
            return _checked(value if isinstance(value, nn.Module) else _call(value, shown), shown)
        except UsageError as error:
            if _frames(error, folder):  # the caller's code raised it
                raise _failure(error, place, shown, folder) from error
            raise
        except (Exception, SystemExit) as error:
            raise _failure(error, place, shown, folder) from error


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or os.sep in place


def _checked_path(place: str) -> Path:
    path, shown = Path(place).expanduser(), printable(place)
    if path.is_file() and path.suffix == ".py":
        return path.resolve()
    if path.is_file():
        raise UsageError(f"{shown} is not a file of Python, whose name ends in .py", f"pass {_FORMS}")
    if path.is_dir():
        raise UsageError(f"{shown} is a folder", "pass the file in it that makes the network, as PATH.py:NAME")
    if not path.suffix and path.with_name(f"{path.name}.py").is_file():
        raise UsageError(f"there is no file {shown}", f"did you mean '{shown}.py'?")
    near = get_close_matches(path.name, [other.name for other in path.parent.glob("*.py")], n=1)
    raise UsageError(
        f"there is no file {shown}",
        f"did you mean '{printable(path.with_name(near[0]))}'?" if near else "check the path",
    )


def _import_file(path: Path) -> ModuleType:
    """The module of a file, which is loaded unless it is already."""
    name = path.stem.replace(".", "_")
    if name in sys.modules or _installed(name, path.parent):
        if name in sys.modules and _file_of(sys.modules[name]) == path:
            return sys.modules[name]
        name = f"{name}_{sha256(os.fsencode(path)).hexdigest()[:8]}"
        if name in sys.modules:
            return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Import from the folder first, as `python FILE` does, even where another module of that name is loaded.

    Nothing is written to the folder: Python's caches are off.
    """
    path, before, no_caches = list(sys.path), dict(sys.modules), sys.dont_write_bytecode
    local = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/__init__.py")}
    hidden = {top for top in local - _NEVER_HIDDEN if top in before and _is_foreign(before[top], folder)}
    for name in before:
        if name.partition(".")[0] in hidden:
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    done = False
    try:
        yield
        done = True
    finally:
        sys.path[:], sys.dont_write_bytecode = path, no_caches
        for name in sys.modules.keys() - before.keys():
            top = name.partition(".")[0]
            if top in local and (not done or top in hidden or _installed(top, folder)):
                del sys.modules[name]
        sys.modules.update({name: module for name, module in before.items() if name.partition(".")[0] in hidden})


def _is_foreign(module: ModuleType, folder: Path) -> bool:
    """Whether a loaded module is of a file that lies outside of the folder, and would not be loaded at every start."""
    file, spec = _file_of(module), getattr(module, "__spec__", None)
    return file is not None and not file.is_relative_to(folder) and getattr(spec, "origin", None) != "frozen"


def _file_of(module: ModuleType) -> Path | None:
    file = getattr(module, "__file__", None)
    return Path(file).resolve() if isinstance(file, str) else None


def _installed(name: str, folder: Path) -> bool:
    """Whether Python finds a module of that name outside of the folder."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != folder]
    return name in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None


def _find(module: ModuleType, name: str, shown: str) -> Any:
    """What has that dotted name in the module."""
    value: Any = module
    where = module.__name__
    for part in name.split("."):
        if not hasattr(value, part) and isinstance(value, ModuleType) and hasattr(value, "__path__"):
            full = f"{value.__name__}.{part}"
            if importlib.util.find_spec(full):
                importlib.import_module(full)
        if not hasattr(value, part):
            known = sorted(key for key, other in vars(value).items() if _is_candidate(key, other, value))
            near = get_close_matches(part, known, n=1) or known[:_MOST_NAMED]
            remedy = did_you_mean(part, near) if near else "define a function of that name, which makes the network"
            raise UsageError(f"{printable(where)} has no '{printable(part)}' ({shown})", remedy)
        value = getattr(value, part)
        where = f"{where}.{part}"
    return value


def _is_candidate(name: str, value: object, owner: object) -> bool:
    """Whether it may make networks, and was not imported into the owner from elsewhere."""
    if name.startswith("_"):
        return False
    imported = isinstance(owner, ModuleType) and getattr(value, "__module__", "") != owner.__name__
    return isinstance(value, nn.Module | ModuleType) or (callable(value) and not imported)


def _call(value: Any, shown: str) -> Any:
    if not callable(value):
        raise UsageError(f"{shown} is {_kind(value)}, not a function or a class", "name what makes the network")
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:  # some functions in C have none
        parameters = {}.values()
    needed = [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if needed:
        names = ", ".join(p.name for p in needed)
        call = f"{shown.rpartition(':')[2]}({', '.join(f'{p.name}=...' for p in needed)})"
        raise UsageError(
            f"{shown} needs {plural(len(needed), 'argument')}, {names}, and is called without",
            f"write a function without arguments that calls it: def make(): return {call}",
        )
    return value()


def _frames(error: BaseException, folder: Path) -> list[traceback.FrameSummary]:
    """The calls that led to the error and are not of this file or of Python's import, the innermost last.

    Where some are of files in the folder, these alone.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen ") and frame.filename not in (__file__, importlib.__file__)
    ]
    packages = {"site-packages", "dist-packages"}
    own = [
        frame
        for frame in frames
        if Path(frame.filename).is_relative_to(folder) and not packages & set(Path(frame.filename).parts)
    ]
    return own or frames


def _failure(error: BaseException, place: str, shown: str, folder: Path) -> UsageError:
    """The one line for an exception of the caller's code, or of its import."""
    frames = _frames(error, folder)
    where = _position(frames[-1].filename, frames[-1].lineno) if frames else ""
    message = printable(next(iter(str(error).splitlines()), ""))
    message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."
    if isinstance(error, SyntaxError):
        where = _position(error.filename or place, error.lineno)
        return UsageError(f"{where} is not valid Python ({printable(error.msg)})", "correct that line")
    if isinstance(error, ModuleNotFoundError) and error.name:
        if not frames and not _is_file(place):
            *packages, last = error.name.split(".")
            near = get_close_matches(last, [file.stem for file in folder.joinpath(*packages).glob("*.py")], n=1)
            remedy = f"install it, or run from the folder that holds {printable((*packages, last)[0])}"
            return UsageError(
                f"there is no module '{printable(error.name)}' ({shown})",
                f"did you mean '{'.'.join((*packages, near[0]))}'?" if near else remedy,
            )
        return UsageError(
            f"{where} imports '{printable(error.name)}', and there is no such module",
            f"install it in the environment of bnlab ({printable(sys.executable)})",
        )
    if isinstance(error, ImportError):
        remedy = "correct that import"
        if _is_file(place) and (folder / "__init__.py").is_file():  # `from .layers import Block` needs the package
            package = printable(folder.name)
            remedy = f"run from {printable(folder.parent)}, and pass {package}.{Path(place).stem}:NAME"
        return UsageError(f"the import at {where or shown} fails ({message})", remedy)
    at = f" at {where}" if where else ""
    return UsageError(
        f"{shown} raises {type(error).__name__}{f' ({message})' if message else ''}{at}",
        "correct that line, or name a function that runs without arguments",
    )


def _position(file: str, line: int | None) -> str:
    path = Path(file)
    shown = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return f"{printable(shown)}:{line}" if line else printable(shown)


def _checked(made: object, shown: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        remedy = "return the network alone, an nn.Module"
        if made is None:
            remedy = "end the function with `return network`"
        raise UsageError(f"{shown} returns {_kind(made)}, not a network", remedy)
    check_tensors(made, f"the network of {shown}")
    return made


def check_tensors(network: nn.Module, shown: str) -> None:
    """Refuse a network whose tensors do not exist, have no values or cannot be changed; messages call it `shown`.

    Raises:
        UsageError: it has lazy layers that have not run, is on the meta device, or was made in inference mode.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(
                f"{shown} has lazy layers, which have no tensors yet ({printable(name)})",
                "run it once on a batch first: network(torch.zeros(2, 3, 224, 224))",
            )
        if tensor.is_meta:
            raise UsageError(f"{shown} is on the meta device, without values ({printable(name)})", "make it on the CPU")
        if tensor.is_inference():
            raise UsageError(
                f"{shown} was made in inference mode, so that its tensors cannot change ({printable(name)})",
                "make it outside of torch.inference_mode()",
            )


def _kind(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    if isinstance(value, tuple | list):
        inside = ", ".join(type(item).__name__ for item in value[:3]) + (", ..." if len(value) > 3 else "")
        return f"a {type(value).__name__} ({inside})"
    return f"an object of class {type(value).__name__}"
