"""`build_model`: the caller's code in a file or a module, and the one line for each way in which it fails."""

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import nn

from bnlab.errors import UsageError
from bnlab.nets.factory import build_model, check_tensors

NET = """
from torch import nn
import layers_of_mine

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.block = layers_of_mine.Block(width)

    def forward(self, x):
        return self.block(x)

class Nets:
    @staticmethod
    def wide():
        return Net(8)

ready = Net(2)
number = 3

def make():
    return Net()

def tuples():
    return Net(), "transform"

def nothing():
    Net()

def kind():
    return Net

def needs(classes, *, width, depth=2):
    return Net()

def meta():
    return nn.Linear(2, 2, device="meta")

def inferring():
    import torch
    with torch.inference_mode():
        return Net()

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

def fails():
    raise ValueError("bad\\nwidth")

def fails_in_torch():
    return nn.GroupNorm(3, 4)

def leaves():
    raise SystemExit(3)

def refuses():
    from bnlab.nets import build
    return build("googlenett", classes=2)
"""
LAYERS = """
from torch import nn

class Block(nn.BatchNorm2d):
    pass
"""


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts without the modules of the others."""
    before, path = dict(sys.modules), list(sys.path)
    yield
    assert sys.path == path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, which holds a folder `code` with the caller's code and a package `pack_of_mine`."""
    write(tmp_path / "code", net_of_mine=NET, layers_of_mine=LAYERS)
    write(tmp_path / "pack_of_mine", __init__="", sub="from .layers import Block\nfactory = Block(3)\n", layers=LAYERS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def refusal(spec: str) -> tuple[str, str]:
    modules, path = set(sys.modules), list(sys.path)
    with pytest.raises(UsageError) as error:
        build_model(spec)
    assert "\n" not in str(error.value)
    assert sys.path == path
    assert not {name for name in set(sys.modules) - modules if "_of_mine" in name}
    return error.value.problem, error.value.remedy


def width(network: nn.Module) -> int:
    return int(next(network.parameters()).numel())


@pytest.mark.parametrize(("name", "channels"), [("make", 4), ("Net", 4), ("Nets.wide", 8), ("ready", 2)])
def test_what_a_name_in_a_file_may_be(home: Path, name: str, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    assert width(build_model(f"code/net_of_mine.py:{name}")) == channels
    assert not list(home.rglob("__pycache__"))  # bnlab writes nothing to the user's folders
    assert not sys.dont_write_bytecode


@pytest.mark.parametrize("spec", ["pack_of_mine.sub:factory", "pack_of_mine:sub.factory", "pack_of_mine:layers.Block"])
def test_modules_of_the_working_folder(home: Path, spec: str) -> None:
    if spec.endswith("Block"):
        assert refusal(spec) == (
            f"{spec} needs 1 argument, num_features, and is called without",
            "write a function without arguments that calls it: def make(): return layers.Block(num_features=...)",
        )
    else:
        assert width(build_model(spec)) == 3


def test_an_installed_module(home: Path) -> None:
    assert isinstance(build_model("torch.nn:ReLU"), nn.ReLU)


def test_classes_can_be_pickled_afterwards(home: Path) -> None:
    network = build_model("code/net_of_mine.py:make")
    assert type(network).__module__ == "net_of_mine"
    assert type(pickle.loads(pickle.dumps(network))) is type(network)
    assert type(build_model("code/net_of_mine.py:Net")) is type(network)  # the file does not run again


def test_files_of_the_same_name_do_not_mix(home: Path) -> None:
    write(home / "other", net_of_mine="import layers_of_mine\nmake = layers_of_mine.make", layers_of_mine=(
        "from torch import nn\nclass Net(nn.Linear): pass\ndef make(): return Net(5, 1)"
    ))  # fmt: skip
    first = build_model("code/net_of_mine.py:make")
    second = build_model("other/net_of_mine.py:make")
    assert isinstance(second, nn.Linear)
    assert type(pickle.loads(pickle.dumps(first))) is type(first)
    assert Path(str(sys.modules["layers_of_mine"].__file__)).parent.name == "code"
    assert Path(str(sys.modules["net_of_mine"].__file__)).parent.name == "code"
    assert isinstance(build_model("other/net_of_mine.py:make"), nn.Linear)


def test_a_class_of_a_file_with_a_taken_name_can_be_pickled(home: Path) -> None:
    """The file has the name of a module of the standard library, which stays what it was."""
    import statistics

    write(home / "taken", statistics="1 / 0")
    refusal("taken/statistics.py:Net")
    write(home / "taken", statistics="from torch import nn\nclass Net(nn.Identity): pass\n")
    network = build_model("taken/statistics.py:Net")
    assert type(network).__module__.startswith("statistics_")
    assert type(pickle.loads(pickle.dumps(network))) is type(network)
    assert type(build_model("taken/statistics.py:Net")) is type(network)
    assert sys.modules["statistics"] is statistics


def test_neighbours_come_before_loaded_modules_and_are_gone_afterwards(home: Path) -> None:
    import statistics

    write(home / "near", net_near="from statistics import make\nimport sched\nassert sched.mine",
          statistics="from torch import nn\ndef make(): return nn.Linear(7, 1)", sched="mine = True")  # fmt: skip
    sys.modules.pop("sched", None)
    assert width(build_model("near/net_near.py:make")) == 7
    assert sys.modules["statistics"] is statistics
    assert "sched" not in sys.modules


def test_the_path_is_restored_after_code_that_changes_it(home: Path) -> None:
    write(home / "adds", adds_of_mine="import sys\nsys.path.append('/nowhere')\nfrom torch.nn import ReLU")
    before = list(sys.path)
    build_model("adds/adds_of_mine.py:ReLU")
    assert sys.path == before


def test_a_file_with_a_name_that_no_import_could_have(home: Path) -> None:
    write(home / "odd", **{"my-net.v2": "from torch.nn import ReLU"})
    assert isinstance(build_model("odd/my-net.v2.py:ReLU"), nn.ReLU)


FORMS = "pass PATH.py:NAME or package.module:NAME"
IN_FILE: list[tuple[str, str, str]] = [
    ("code/net_of_mine.py", "does not say", "code/net_of_mine.py:NAME"),
    ("net_of_mine", "does not say", FORMS),
    ("", "'' does not say", FORMS),
    ("code/net_of_mine.py:", "does not say", "code/net_of_mine.py:NAME"),
    (":make", "does not say", FORMS),
    ("code/net_of_mine.py:make()", "'make()' in", FORMS),
    ("code/net_of_min.py:make", "there is no file code/net_of_min.py", "did you mean 'code/net_of_mine.py'?"),
    ("code/net_of_mine:make", "there is no file code/net_of_mine", "did you mean 'code/net_of_mine.py'?"),
    ("nowhere/net.py:make", "there is no file nowhere/net.py", "check the path"),
    ("code/:make", "code/ is a folder", "PATH.py:NAME"),
    ("./notes.txt:make", "./notes.txt is not a file of Python", FORMS),
    ("code/net_of_mine.py:mke", "net_of_mine has no 'mke'", "did you mean 'make'?"),
    ("code/net_of_mine.py:Nets.wid", "net_of_mine.Nets has no 'wid'", "did you mean 'wide'?"),
    ("code/net_of_mine.py:zzzz", "net_of_mine has no 'zzzz'", "there are Net, Nets, "),
    ("code/net_of_mine.py:number", "is an object of class int, not a function or a class", "name what makes"),
    ("code/net_of_mine.py:needs", "needs 2 arguments, classes, width, and", "needs(classes=..., width=...)"),
    ("code/net_of_mine.py:tuples", "returns a tuple (Net, str), not a network", "return the network alone"),
    ("code/net_of_mine.py:nothing", "returns None, not a network", "`return network`"),
    ("code/net_of_mine.py:kind", "returns the class Net itself, not a network", "return the network alone"),
    ("code/net_of_mine.py:meta", "is on the meta device, without values (weight)", "CPU"),
    ("code/net_of_mine.py:inferring", "was made in inference mode", "outside of torch.inference_mode()"),
    ("code/net_of_mine.py:lazy", "has lazy layers, which have no tensors yet (1.weight)", "run it once"),
    ("code/net_of_mine.py:fails", "raises ValueError (bad) at code/net_of_mine.py:48", "correct that line"),
    ("code/net_of_mine.py:fails_in_torch", "at code/net_of_mine.py:51", "correct that line"),
    ("code/net_of_mine.py:leaves", "raises SystemExit (3) at code/net_of_mine.py:54", "correct that line"),
    ("code/net_of_mine.py:refuses", "raises UsageError (no network is called", "correct that line"),
    ("pack_of_min.sub:make", "there is no module 'pack_of_min'", "run from the folder that holds pack_of_min"),
    ("pack_of_mine.subs:make", "there is no module 'pack_of_mine.subs'", "did you mean 'pack_of_mine.sub'?"),
    ("pack_of_mine:layers.Blok", "pack_of_mine.layers has no 'Blok'", "did you mean 'Block'?"),
]


@pytest.mark.parametrize(("spec", "problem", "remedy"), IN_FILE, ids=[spec or "empty" for spec, _, _ in IN_FILE])
def test_each_failure_is_one_line(home: Path, spec: str, problem: str, remedy: str) -> None:
    (home / "notes.txt").write_text("")
    found = refusal(spec)
    assert problem in found[0]
    assert remedy in found[1]


@pytest.mark.parametrize(
    ("text", "problem", "remedy"),
    [
        ("x = (\n\ndef make(): pass", "bad/bad_of_mine.py:1 is not valid Python ('(' was never closed)", "that line"),
        ("\nimport layers_of_min", "bad_of_mine.py:2 imports 'layers_of_min', and there is no such module", "install"),
        ("from layers_of_mine import Blok", "the import at bad/bad_of_mine.py:1 fails (cannot import", "that import"),
        ("from broken_of_mine import x", "bad/broken_of_mine.py:3 is not valid Python", "that line"),
        ("import layers_of_mine\n1 / 0", "raises ZeroDivisionError (division by zero) at bad/bad_of_mine.py:2", "line"),
        ("import sys\nsys.exit()", "raises SystemExit at bad/bad_of_mine.py:2", "line"),
        ("raise ValueError('é' * 1000)", f"raises ValueError ({'é' * 200}...) at bad/bad_of_mine.py:1", "line"),
    ],
    ids=["syntax", "module", "name", "neighbour", "runs", "exits", "long"],
)  # fmt: skip
def test_code_that_cannot_be_imported(home: Path, text: str, problem: str, remedy: str) -> None:
    write(home / "bad", bad_of_mine=text, layers_of_mine=LAYERS, broken_of_mine="\n\nx = = 2")
    found = refusal("bad/bad_of_mine.py:make")
    assert problem in found[0]
    assert remedy in found[1]


def test_a_file_of_a_package_is_to_be_passed_as_its_module(home: Path) -> None:
    problem, remedy = refusal("pack_of_mine/sub.py:factory")
    assert problem.startswith("the import at pack_of_mine/sub.py:1 fails")
    assert remedy == f"run from {home}, and pass pack_of_mine.sub:NAME"


def test_a_file_that_failed_is_run_again(home: Path) -> None:
    write(home / "bad", bad_of_mine="1 / 0")
    refusal("bad/bad_of_mine.py:make")
    write(home / "bad", bad_of_mine="from torch.nn import ReLU as make")
    assert isinstance(build_model("bad/bad_of_mine.py:make"), nn.ReLU)


def test_ctrl_c_is_not_swallowed(home: Path) -> None:
    write(home / "stop", stop_of_mine="raise KeyboardInterrupt")
    before = list(sys.path)
    with pytest.raises(KeyboardInterrupt):
        build_model("stop/stop_of_mine.py:make")
    assert sys.path == before
    assert "stop_of_mine" not in sys.modules


def test_networks_with_tensors_pass() -> None:
    check_tensors(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "it")
