"""The verbs from photos to a classifier, one after the other, and what they refuse."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import QUICK, Outcome, write_photos

Command = Callable[..., Outcome]


def test_odd_names_from_split_to_predict(bnlab: Command, tmp_path: Path) -> None:
    """Spaces, quotes, newlines, markup, Chinese and undecodable bytes, in the commands as a person types them."""
    photos = write_photos(tmp_path / "photos", each=6)
    odd = ["a \"b\" 'c'.png", "new\nline.png", "百合 花.png", "[red]$x_1$.png", os.fsdecode(b"\xff\xfe.png"), "-v.png"]
    (photos / "ring").rename(photos / "百 [b]$合$\n")
    for number, name in enumerate(odd):
        shutil.copy(photos / "disc" / f"disc00{number}.png", photos / "stripes" / name)
    done = bnlab("split", photos, "--into", "data", "--val", 0.4)
    assert (done.status, done.out.splitlines()[-1]) == (0, "data: written. Next: bnlab train data")
    done = bnlab("train", "data", *QUICK, "--epochs", 1)
    assert done.status == 0, done.err
    assert done.out.splitlines()[-1].endswith("Next: bnlab predict runs/train/best.safetensors PHOTO")
    done = bnlab("evaluate", "runs/train/best.safetensors", "data", "--split", "all", "--json")
    assert done.status == 0, done.err
    document = json.loads(done.out)
    assert document["n"] == 24
    assert "百 [b]$合$\n" in document["classes"]
    done = bnlab("predict", "runs/train/best.safetensors", photos / "stripes", "--csv", "p.csv", "--show")
    assert done.status == 0, done.err
    assert r"new\nline.png" in done.out
    assert "[red]$x_1$.png" in done.out
    assert len(json.loads(bnlab("predict", "runs/train/best.safetensors", photos / "stripes", "--json").out)) == 12


# A command line, and parts of its refusal: what, where, and the remedy.
REFUSALS: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
    (("trian", "x"), ("trian", "'train'?", "`bnlab --help`")),
    (("split", "none", "--into", "x"), ("no folder none", "check the path")),
    (("split", "data", "--into", "x"), ("data", "already", "bnlab train data")),
    (("split", "data/val", "--into", "data/val/x"), ("data/val/x", "data/val")),
    (("split", "data/val", "--into", "x", "--val", 0), ("val", "test", "0.0")),
    (("split", "data/val", "--into", "x", "--val", 2), ("--val", "less than or equal to 1", "bnlab split --help")),
    (("split", "data/val", "--into", "x", "--link", "--copy"), ("--link", "--copy", "not both")),
    (("split", "data/val", "--into", "text.jpg", "--val", 0.3), ("text.jpg is a file", "folder for into")),
    (("train",), ("DATA is missing", "--resume")),
    (("train", "none"), ("no folder none", "check the path")),
    (("train", "data", "--epoch", 3), ("--epoch", "--epochs", "`bnlab train --help`")),
    (("train", "data", "--epochs", 0), ("--epochs", "greater than or equal to 1")),
    (("train", "data", "--time", "soon"), ("time is 'soon'", "20m")),
    (("train", "data", "--freeze", "stm"), ("--freeze", "stm", "'stem'")),
    (("train", "data", "--set", "epochs="), ("--set epochs=", "has no value")),
    (("train", "data", "--set", "epochs=null"), ("epochs is None", "valid integer")),
    (("train", "data", "--set", "seed=2026-99-99"), ("seed=2026-99-99", "not YAML", "quote")),
    (("train", "data", "--set", "epoch=3"), ("no key 'epoch'", "did you mean 'epochs'?")),
    (("train", "data", "--recipe", "clasic"), ("'clasic'", "did you mean 'classic'?")),
    (("train", "data", "--network", "bn_gogglenet"), ("'bn_gogglenet'", "did you mean 'bn_googlenet'?")),
    (("train", "data", "--name", "a/b"), ("'a/b'", "without slashes")),
    (("train", "--resume"), ("no run to resume in runs", "bnlab train DATA")),
    (("train", "pickle.pth"), ("pickle.pth", "path, class, split, sha256")),
    (("evaluate", "none", "data"), ("none", "check the path")),
    (("evaluate", "data", "data"), ("data is a folder", "folder with best.safetensors")),
    (("evaluate", "BEST", "none"), ("no folder none", "check the path")),
    (("evaluate", "BEST", "hollow"), ("hollow has no photos", "split.csv")),
    (("evaluate", "BEST", "data", "--name", "empty/x"), ("'empty/x'",)),
    (("evaluate", "data"), ("CLASSIFIER is missing", "before data", "`bnlab evaluate --help`")),
    (("evaluate", "BEST"), ("DATA is missing", "BEST", "`bnlab evaluate --help`")),
    (("evaluate", "data", "BEST"), ("DATA is missing", "BEST")),
    (("evaluate", "BEST", "data", "data"), ("data is a folder", "folder with best.safetensors")),
    (("evaluate", "BEST", "data", "--crops", 12), ("--crops", "12", "144")),
    (("evaluate", "BEST", "data", "--split", "test"), ("data has no test", "use split")),
    (("predict", "BEST", "none.jpg"), ("none.jpg", "check the path")),
    (("predict", "BEST", "text.jpg"), ("text.jpg cannot be used", "not an image", "replace")),
    (("predict", "BEST", "empty"), ("empty has no photos", "pass photos")),
    (("predict", "PICKLE", "text.jpg"), ("pickle.pth is a pickle", "run code")),
    (("predict", "CUT", "text.jpg"), ("cut.safetensors",)),
    (("demo", "--seed", -1), ("seed is -1", "greater than or equal to 0")),
]


@pytest.mark.parametrize(("arguments", "fragments"), REFUSALS, ids=[" ".join(map(str, a)) for a, _ in REFUSALS])
def test_refusals(
    bnlab: Command, data: Path, trained: Path, arguments: tuple[object, ...], fragments: tuple[str, ...]
) -> None:
    """One line on stderr with what, where and the remedy; status 2; nothing on stdout and nothing left behind."""
    home = data.parent
    best = trained / "best.safetensors"
    (home / "text.jpg").write_text("text")
    (home / "empty").mkdir()
    for folder in ("train/a", "train/b", "val/a"):
        (home / "hollow" / folder).mkdir(parents=True)
    (home / "pickle.pth").write_bytes(b"PK\x03\x04" + bytes(99))
    (home / "cut.safetensors").write_bytes(best.read_bytes()[:5000])
    before = sorted(home.rglob("*"))
    files = {"BEST": best, "PICKLE": "pickle.pth", "CUT": "cut.safetensors"}
    done = bnlab(*(files.get(str(a), a) for a in arguments))
    for fragment in fragments:
        assert fragment.replace("BEST", str(best)) in done.complaint
    assert done.status == 2
    assert done.out == ""
    assert sorted(home.rglob("*")) == before
