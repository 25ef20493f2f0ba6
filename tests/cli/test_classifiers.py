import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import QUICK, Outcome, write_photos

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


def test_the_main_job(bnlab: Command, tmp_path: Path) -> None:
    """Split, train, evaluate, predict: as a person types them."""
    write_photos(tmp_path / "photos", each=16)
    done = bnlab("split", "photos", "--into", "data", "--val", 0.3)
    assert done.status == 0
    assert done.out.splitlines()[0].split() == ["class", "train", "val", "all"]
    assert done.out.splitlines()[-1] == "data: written. Next: bnlab train data"
    assert bnlab("split", "photos", "--into", "data", "--val", 0.3).out.splitlines()[-1] == (
        "data: nothing to do, it is all there. Next: bnlab train data"
    )

    done = bnlab("train", "data", *QUICK, "--epochs", 8)
    assert done.status == 0
    assert "epoch 8/8" in done.err
    assert done.out.startswith("best val accuracy ")
    assert done.out.splitlines()[-1] == (
        "runs/train: report.html shows it. Next: bnlab predict runs/train/best.safetensors PHOTO"
    )

    done = bnlab("evaluate", "runs/train/best.safetensors", "data")
    assert done.status == 0
    assert "read                     val, n = " in done.out
    assert done.out.splitlines()[-1] == "runs/evaluate: report.html shows it."
    files = {p.name for p in (tmp_path / "runs" / "evaluate").iterdir()}
    assert files >= {"evaluation.json", "predictions.csv", "confusion.png", "reliability.png", "report.html"}

    done = bnlab("predict", "runs/train/best.safetensors", "photos/ring")
    assert done.status == 0
    assert len(done.out.splitlines()) == 17
    assert done.out.splitlines()[1].startswith("photos/ring/ring000.png  ")


def test_the_documents(bnlab: Command, data: Path, trained: Path) -> None:
    done = bnlab("train", data, *QUICK, "--epochs", 1, "--name", "a", "--json")
    document = json.loads(done.out)
    assert list(document) == ["run", "best", "epochs", "val_top1", "seconds", "frozen"]
    assert (document["run"], document["epochs"]) == ("runs/a", 1)
    assert 0 <= document["val_top1"] <= 1

    document = json.loads(bnlab("evaluate", document["best"], data, "--json").out)
    keys = ["split", "n", "top1", "top5", "top1_interval", "ece", "classes", "per_class", "confusion"]
    assert list(document)[:9] == keys
    assert (document["split"], document["n"], document["classes"]) == ("val", 12, ["disc", "ring", "stripes"])
    low, high = document["top1_interval"]
    assert 0 <= low <= document["top1"] <= high <= 1
    assert sum(map(sum, document["confusion"])) == 12
    assert list(document["per_class"][0]) == ["label", "n", "precision", "recall", "f1"]

    (data / "x.jpg").write_text("text")
    given = [data / "val/ring/ring101.png", data / "x.jpg", data / "val/disc/disc100.png"]
    done = bnlab("predict", trained / "best.safetensors", *given, "--top", 2, "--json")
    document = json.loads(done.out)
    assert done.status == 0
    assert [one["path"] for one in document] == [str(path) for path in given]
    assert list(document[0]) == ["path", "label", "probability", "top", "error"]
    assert document[0]["error"] is None
    assert document[0]["top"][0] == {"label": document[0]["label"], "probability": document[0]["probability"]}
    assert document[1] == {
        "path": str(data / "x.jpg"), "label": None, "probability": None, "top": [],
        "error": "it is not an image that Pillow can read",
    }  # fmt: skip

    write_photos(data / "photos", each=6)
    shutil.copy(data / "photos/ring/ring000.png", data / "photos/disc/twin.png")
    (data / "photos/disc/bad.jpg").write_text("text")
    document = json.loads(bnlab("split", data / "photos", "--into", "new", "--val", 0.3, "--json").out)
    assert list(document) == ["into", "written", "counts", "refused", "duplicates", "label_conflicts"]
    assert sum(sum(sides.values()) for sides in document["counts"].values()) == 19
    assert document["refused"] == [
        {"path": str(data / "photos/disc/bad.jpg"), "reason": "it is not an image that Pillow can read"}
    ]
    (conflict,) = document["label_conflicts"]
    assert {photo["class"] for photo in conflict["photos"]} == {"ring", "disc"}
    assert conflict["exact"] is True


def test_finding_a_learning_rate(bnlab: Command, data: Path, tmp_path: Path) -> None:
    small = (*QUICK, "--network", "bn_mlp")
    done = bnlab("train", data, *small, "--find-lr")
    assert done.status == 0
    assert "warning: learning_rate has no effect: --find-lr tries them from low to high" in done.err
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"find-lr"}
    folder = tmp_path / "runs/find-lr"
    assert {path.name for path in folder.iterdir()} == {"find-lr.png", "find-lr.csv"}
    with Image.open(folder / "find-lr.png") as picture:
        assert picture.width > 500
    with (folder / "find-lr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "learning_rate", "loss", "smoothed_loss"]
    assert 20 < len(rows) <= 200
    assert float(rows[0]["learning_rate"]) == 1e-5

    again = bnlab("train", data, *small, "--find-lr", "--name", "twice", "--json")
    document = json.loads(again.out)
    assert (tmp_path / "runs/twice/find-lr.csv").read_bytes() == (folder / "find-lr.csv").read_bytes()
    assert (document["steps"], document["photos"], document["classes"]) == (len(rows), 24, 3)
    rate = document["suggested"]  # these shapes are learned at a rate near 0.02 (tests/training/test_session.py)
    assert 1e-3 < rate < 1
    assert done.out.splitlines()[-1] == (
        f"runs/find-lr/find-lr.png shows it. "
        f"Next: bnlab train {data} --learning-rate {rate:g} and the other options as here"
    )
    assert bnlab("train", data, "--find-lr", "--name", "twice").complaint == (
        "run runs/twice exists already: take another --name"
    )
    assert "DATA is missing" in bnlab("train", "--find-lr").complaint


def test_resuming_from_the_command_line(bnlab: Command, data: Path) -> None:
    bnlab("train", data, *QUICK, "--epochs", 1)
    done = bnlab("train", "--resume")
    assert done.status == 0
    assert "run runs/train is complete: 1 of 1 epochs" in done.err
    assert bnlab("train", "--resume", "--name", "trian").complaint == (
        "there is no run runs/trian: did you mean 'train'?"
    )
    for extra, what in (
        (("--epochs", 3), "--epochs"),
        (("--strict",), "--strict"),
        (("--find-lr",), "--find-lr"),
        ((data,), "DATA"),
        (("--set", "size=64"), "--size"),
    ):
        assert f"so {what} has no effect; leave it out" in bnlab("train", "--resume", *extra).complaint
    assert bnlab("train", "--resume", "--workers", 2).status == 0
    assert bnlab("train", "--resume", "--workers", 999).complaint == (
        "workers cannot be 999 (in the options): input should be less than or equal to 256"
    )
    assert bnlab("train", "--resume", "--device", "cpu").status == 0


REFUSALS: list[tuple[tuple[object, ...], str]] = [
    (("split", "none", "--into", "x"), "there is no folder none: check the path"),
    (("train", "none"), "there is no folder none: check the path"),
    (("train",), "Invalid value: DATA is missing: give a folder of classes, or --resume to go on with a run: see "),
    (("trian", "x"), "No such command 'trian'. Did you mean 'train'?: see `bnlab --help`"),
    (("train", "data", "--epoch", 3), "No such option: --epoch (Possible options: --epochs): see `bnlab train --help`"),
    (
        ("train", "data", "--epochs", 0),
        "epochs cannot be 0 (in the options): input should be greater than or equal to 1",
    ),
    (
        ("train", "data", "--size", 15),
        "size cannot be 15 (in the options): input should be greater than or equal to 16",
    ),
    (("train", "data", "--set", "epochs="), "--set epochs= has no value: say, for example, --set epochs=20"),
    (
        ("train", "data", "--set", "epochs=null"),
        "epochs cannot be None (in the options): input should be a valid integer",
    ),
    (("train", "data", "--set", "seed=2026-99-99"), "--set seed=2026-99-99 has a value that is no YAML: quote it"),
    (("evaluate", "BEST", "hollow"), "hollow has no photos: use a split folder, a split.csv or a folder of classes"),
    (("evaluate", "BEST", "data", "--name", "empty/x"), "a run cannot be named 'empty/x'"),
    (("demo", "--seed", -1), "seed cannot be -1 (in the options): input should be greater than or equal to 0"),
    (("train", "data", "--set", "epoch=3"), "a recipe has no key 'epoch' (in the options): did you mean 'epochs'?"),
    (("train", "data", "--recipe", "clasic"), "no recipe is called 'clasic': did you mean 'classic'?"),
    (
        ("train", "data", "--network", "bn_gogglenet"),
        "no network is called 'bn_gogglenet': did you mean 'bn_googlenet'?",
    ),
    (
        ("train", "data", "--name", "a/b"),
        "a run cannot be named 'a/b': a name has no slashes and no control characters; ",
    ),
    (("train", "data", "--resume"), "Invalid value: --resume goes on with a run's own recipe and data, so DATA has no"),
    (("train", "--resume"), "there is no run to resume in runs: begin one with `bnlab train DATA`"),
    (("evaluate", "none", "data"), "there is no classifier file none: check the path"),
    (("evaluate", "data", "data"), "data is a folder: give the file, such as data/best.safetensors"),
    (("evaluate", "BEST", "none"), "there is no folder none: check the path"),
    (
        ("evaluate", "data"),
        "Invalid value: CLASSIFIER is missing: give a classifier file before data: see `bnlab evaluate --help`",
    ),
    (
        ("evaluate", "BEST"),
        "Invalid value: BEST is a classifier file, and DATA comes last: give the photos after it: see",
    ),
    (("evaluate", "data", "BEST"), "Invalid value: BEST is a classifier file, and DATA comes last: give the photos"),
    (("evaluate", "BEST", "data", "data"), "data is a folder: give the file, such as data/best.safetensors"),
    (("evaluate", "BEST", "data", "--crops", 12), "Invalid value for '--crops': '12' is not one of '1', '10', '144'"),
    (("evaluate", "BEST", "data", "--split", "test"), "data has no test split: use --split all or train or val"),
    (("predict", "BEST", "none.jpg"), "there is no photo none.jpg: check the path"),
    (
        ("predict", "BEST", "text.jpg"),
        "text.jpg cannot be used, it is not an image that Pillow can read: replace the photo or",
    ),
    (("predict", "BEST", "empty"), "empty has no photos: give photos, or a folder of them"),
    (("predict", "PICKLE", "text.jpg"), "pickle.pth is a pickle, which can run code when it is loaded: give a"),
    (("predict", "CUT", "text.jpg"), "cut.safetensors is not a complete classifier file ("),
    (("split", "data/val", "--into", "data/val/x"), "data/val/x lies within data/val, which is never written to: use"),
    (("split", "data", "--into", "x"), "data is already split: train on it with `bnlab train data`"),
    (("train", "pickle.pth"), "pickle.pth lists no photos: it needs the columns path, class, split, sha256"),
    (("split", "data/val", "--into", "x", "--val", 0), "val 0.0 and test 0.0 leave nothing to split: use fractions"),
    (
        ("split", "data/val", "--into", "x", "--link", "--copy"),
        "Invalid value: --link and --copy exclude each other: see",
    ),
    (("import", "none.pth", "--output", "x.safetensors"), "there is no file none.pth: check the path"),
    (
        ("import", "CUT", "--output", "x.safetensors"),
        "cut.safetensors is not a complete file of weights: use what torch",
    ),
    (
        ("import", "PICKLE", "--output", "x.safetensors"),
        "pickle.pth is not a complete file of weights: use what torch.save",
    ),
    (("import", "none.pth"), "Missing option '--output': see `bnlab import --help`"),
    (("split", "data/val", "--into", "text.jpg", "--val", 0.3), "text.jpg is a file: use a new folder for --into"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSALS, ids=[" ".join(map(str, a)) for a, _ in REFUSALS])
def test_refusals(bnlab: Command, data: Path, trained: Path, arguments: tuple[object, ...], message: str) -> None:
    """One line on stderr with what, where and the remedy; status 2; nothing on stdout and nothing left behind."""
    home = data.parent
    best = trained / "best.safetensors"
    (home / "text.jpg").write_text("text")
    (home / "empty").mkdir()
    for side in ("train/a", "train/b", "val/a"):
        (home / "hollow" / side).mkdir(parents=True)
    (home / "pickle.pth").write_bytes(b"PK\x03\x04" + bytes(99))
    (home / "cut.safetensors").write_bytes(best.read_bytes()[:5000])
    before = sorted(home.rglob("*"))
    stand_ins = {"BEST": best, "PICKLE": "pickle.pth", "CUT": "cut.safetensors"}
    done = bnlab(*(stand_ins.get(str(a), a) for a in arguments))
    assert done.complaint.startswith(message.replace("BEST", str(best)))
    assert done.status == 2
    assert done.out == ""
    assert sorted(home.rglob("*")) == before


def test_odd_names_all_the_way(bnlab: Command, tmp_path: Path) -> None:
    """Spaces, quotes, newlines, markup, Chinese and bytes that are no text, from split to predict."""
    photos = write_photos(tmp_path / "photos", each=6)
    odd = ["a \"b\" 'c'.png", "new\nline.png", "百合 花.png", "[red]$x_1$.png", os.fsdecode(b"\xff\xfe.png"), "-v.png"]
    (photos / "ring").rename(photos / "百 [b]$合$\n")
    for number, name in enumerate(odd):
        shutil.copy(photos / "disc" / f"disc00{number}.png", photos / "stripes" / name)
    assert bnlab("split", photos, "--into", "data", "--val", 0.4).status == 0
    done = bnlab("train", "data", *QUICK, "--epochs", 1)
    assert done.status == 0, done.err
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


def test_colons_are_no_emoji(bnlab: Command, photos: Path) -> None:
    done = bnlab("split", photos, "--into", "o:100:k", "--val", 0.3)
    assert done.out.splitlines()[-1] == "o:100:k: written. Next: bnlab train o:100:k"
