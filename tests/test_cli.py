"""The command line: what it prints, what it refuses and how, and how soon."""

import csv
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bnlab import __version__
from bnlab.files import file_sha256
from bnlab.runs import Run
from tests.conftest import QUICK, Outcome, write_photos

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


@pytest.mark.parametrize("arguments", [(), ("--help",), *((verb, "--help") for verb in VERBS)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    script = (
        "import sys; from bnlab.__main__ import run; status = run(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'sklearn', 'scipy', 'matplotlib', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == (0 if arguments else 2), done.stderr
    assert "Usage: bnlab" in done.stdout


def test_help_answers_at_once() -> None:
    """The median of five: 0.4 s is promised; a machine under load is given twice that."""
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "bnlab", "train", "--help"], capture_output=True, check=True)
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.8


def test_version(bnlab: Command) -> None:
    assert bnlab("--version").out == f"bnlab {__version__}\n"


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


def test_predictions_as_csv_and_picture(bnlab: Command, data: Path, trained: Path, tmp_path: Path) -> None:
    given = data / "val/ring"
    done = bnlab("predict", trained / "best.safetensors", given, "--csv", "out/p.csv", "--top", 2, "--show")
    assert done.status == 0
    with (tmp_path / "out/p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "path",
        "label",
        "probability",
        "error",
        "label2",
        "probability2",
    ]
    assert len(rows) == 4
    assert done.out.splitlines()[-1] == "runs/predict/predictions.png: the photos with their answers."
    with Image.open(tmp_path / "runs/predict/predictions.png") as picture:
        assert picture.width > 500
    before = (tmp_path / "out/p.csv").read_bytes()
    assert bnlab("predict", trained / "best.safetensors", given, "--csv", "out/p.csv").complaint == (
        "out/p.csv exists already: give --csv a new file"
    )
    assert (tmp_path / "out/p.csv").read_bytes() == before
    done = bnlab("predict", trained / "best.safetensors", given / "ring100.png", "--show")
    assert done.out.splitlines()[-1].startswith("runs/predict2/predictions.png")


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
    rate = document["suggested"]  # these shapes are learned at a rate near 0.02 (tests/training/test_run.py)
    assert 1e-3 < rate < 1
    assert done.out.splitlines()[-1] == (
        f"runs/find-lr/find-lr.png shows it. "
        f"Next: bnlab train {data} --learning-rate {rate:g} and the other options as here"
    )
    assert bnlab("train", data, "--find-lr", "--name", "twice").complaint == (
        "run runs/twice exists already: take another --name"
    )
    assert "DATA is missing" in bnlab("train", "--find-lr").complaint


def test_finding_a_learning_rate_without_an_answer(bnlab: Command, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.training import lr_finder
    from bnlab.training.state import LossNotFiniteError

    monkeypatch.setattr(lr_finder, "train_step", lambda *_: (torch.tensor(1.5), torch.tensor(0)))
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 0
    assert "suggested: none (the loss never fell by more than its noise: by 0.000, standard error 0.000)" in done.out
    assert "It suggests none: look at the curve" in done.out.splitlines()[-1]

    def not_finite(*_: object) -> None:
        raise LossNotFiniteError(math.nan, 0)

    monkeypatch.setattr(lr_finder, "train_step", not_finite)
    done = bnlab("train", data, *QUICK, "--find-lr")
    assert done.status == 1
    assert done.complaint == (
        "the loss was not finite before any step, so no learning rate is to blame: "
        "check mean, std and the file of --init"
    )


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
    (("evaluate", "BEST", "hollow"), "hollow has no photos: give a split folder, a split.csv or a folder of classes"),
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
    (("evaluate", "BEST", "data", "--split", "test"), "data has no test side: say --split all or train or val"),
    (("predict", "BEST", "none.jpg"), "there is no photo none.jpg: check the path"),
    (
        ("predict", "BEST", "text.jpg"),
        "text.jpg cannot be used, it is not an image that Pillow can read: replace the photo or",
    ),
    (("predict", "BEST", "empty"), "empty has no photos: give photos, or a folder of them"),
    (("predict", "PICKLE", "text.jpg"), "pickle.pth is a pickle, which can run code when it is loaded: give a"),
    (("predict", "CUT", "text.jpg"), "cut.safetensors is no whole classifier file ("),
    (("split", "data/val", "--into", "data/val/x"), "data/val/x lies within data/val, which is never written to: give"),
    (("split", "data", "--into", "x"), "data is split already: train on it: bnlab train data"),
    (("train", "pickle.pth"), "pickle.pth lists no photos: it needs the columns path, class, split, sha256"),
    (("split", "data/val", "--into", "x", "--val", 0), "val 0.0 and test 0.0 leave nothing to split: give shares"),
    (
        ("split", "data/val", "--into", "x", "--link", "--copy"),
        "Invalid value: --link and --copy exclude each other: see",
    ),
    (("import", "none.pth", "--output", "x.safetensors"), "there is no file none.pth: check the path"),
    (("import", "CUT", "--output", "x.safetensors"), "cut.safetensors is no whole file of weights: give what torch"),
    (("import", "PICKLE", "--output", "x.safetensors"), "pickle.pth is no whole file of weights: give what torch.save"),
    (("import", "none.pth"), "Missing option '--output': see `bnlab import --help`"),
    (("split", "data/val", "--into", "text.jpg", "--val", 0.3), "text.jpg is a file: give --into a new folder"),
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


def test_broken_photos_are_named_and_strict_refuses_them(bnlab: Command, photos: Path) -> None:
    for number in range(7):
        (photos / "disc" / f"bad{number}.jpg").write_text("text")
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert done.status == 0
    assert f"warning: left out {photos}/disc/bad0.jpg: it is not an image that Pillow can read" in done.err
    assert "warning: and 2 more photos that cannot be used" in done.err
    assert "7 photos cannot be used and are left out" in done.out
    done = bnlab("split", photos, "--into", "other", "--strict")
    assert done.status == 2
    assert done.complaint.startswith(f"7 photos cannot be used (the first: {photos}/disc/bad0.jpg, it is not an image")
    assert not Path("other").exists()


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


def test_a_run_in_use(bnlab: Command, data: Path) -> None:
    bnlab("train", data, *QUICK, "--epochs", 1)
    with Run(Path("runs/train")).locked():
        assert bnlab("train", "--resume").complaint == (
            "run runs/train is in use by another training: wait for it, or take another --name"
        )
        assert bnlab("train", data, *QUICK, "--name", "train").complaint == (
            "run runs/train exists already: take another --name, or go on with it: --resume --name train"
        )


def test_a_classifier_from_the_future(bnlab: Command, trained: Path, tmp_path: Path) -> None:
    content = (trained / "best.safetensors").read_bytes()
    old, new = rb"{\"format\": 1,", rb"{\"format\": 9,"
    assert content.count(old) == 1
    (tmp_path / "new.safetensors").write_bytes(content.replace(old, new))
    assert bnlab("predict", "new.safetensors", trained).complaint == (
        f"{trained} has no photos: give photos, or a folder of them"
    )
    assert bnlab("evaluate", "new.safetensors", trained.parents[1] / "data").complaint == (
        "new.safetensors has classifier format 9, and this bnlab reads up to 1: upgrade bnlab"
    )


def test_a_diverged_training_is_status_1(bnlab: Command, data: Path) -> None:
    done = bnlab("train", data, *QUICK, "--network", "small_inception", "--learning-rate", 1e8, "--epochs", 3)
    assert done.status == 1
    assert "--learning-rate" in done.complaint


def test_a_closed_pipe_is_no_error(trained: Path) -> None:
    """As `bnlab predict ... | head -0`: the reader is gone before a word is written."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "bnlab", "predict", f"{trained}/best.safetensors", str(trained.parents[1] / "data")]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_a_terminal_cannot_show(photos: Path) -> None:
    (photos / "disc").rename(photos / "百合")
    words = [sys.executable, "-m", "bnlab", "split", str(photos), "--into", str(photos.parent / "data"), "--val", "0.3"]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(words, capture_output=True, encoding="cp1252", env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert r"\u767e\u5408" in done.stdout


def test_places_that_cannot_be_written_to(bnlab: Command, data: Path, photos: Path, trained: Path) -> None:
    Path("afile").write_text("mine")
    Path("runs").mkdir()
    Path("runs/clash").write_text("mine")
    best, photo = trained / "best.safetensors", data / "val/ring/ring100.png"
    for arguments, message in (
        (("predict", best, photo, "--csv", "afile/p.csv"), "afile/p.csv cannot be written ("),
        (("train", data, *QUICK, "--name", "clash"), "runs/clash cannot be written (Not a directory): give a place"),
        (("train", data, *QUICK, "--name", "n" * 300), f"runs/{'n' * 300} cannot be written (File name too long)"),
        (("split", photos, "--into", "/proc/x", "--val", 0.3), "/proc/x cannot be written (No such file or directory)"),
    ):
        done = bnlab(*arguments)
        assert done.complaint.startswith(message)
        assert done.status == 2


def test_a_link_to_nowhere_is_refused_at_once(bnlab: Command, data: Path) -> None:
    """A scratch disk that is not mounted."""
    Path("runs").symlink_to("/nonexistent/scratch")
    assert (
        bnlab("train", data, *QUICK).complaint == "runs cannot be written (File exists): give a place you may write to"
    )


def test_colons_are_no_emoji(bnlab: Command, photos: Path) -> None:
    done = bnlab("split", photos, "--into", "o:100:k", "--val", 0.3)
    assert done.out.splitlines()[-1] == "o:100:k: written. Next: bnlab train o:100:k"


def test_closed_streams_are_no_error(trained: Path) -> None:
    command = f"{sys.executable} -m bnlab predict {trained}/best.safetensors {trained.parents[1] / 'data'}"
    for closing in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(f"{command} {closing}", shell=True, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_training_outlives_who_reads_its_messages(data: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "bnlab", "train", "data", *map(str, QUICK), "--epochs", "1"]
    done = subprocess.run(words, cwd=data.parent, stdout=subprocess.PIPE, stderr=writing, text=True, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert done.stdout.startswith("best val accuracy")


def test_a_run_can_be_evaluated_by_its_folder(bnlab: Command, trained: Path) -> None:
    done = bnlab("evaluate", trained / "best.safetensors", trained, "--json")
    assert (json.loads(done.out)["split"], json.loads(done.out)["n"]) == ("val", 12)


def test_a_spoilt_environment_stops_no_resume(bnlab: Command, data: Path) -> None:
    bnlab("train", data, *QUICK, "--epochs", 1)
    Path("runs/train/environment.json").write_text("{")
    done = bnlab("train", "--resume")
    assert done.status == 0
    assert "this run began with other processor" in done.err


def test_broken_weights_give_no_answer(bnlab: Command, trained: Path, data: Path) -> None:
    import safetensors.torch

    from bnlab.classifier.card import to_json
    from bnlab.classifier.file import read_classifier

    tensors, card = read_classifier(trained / "best.safetensors")
    tensors["fc.bias"].fill_(float("nan"))
    Path("nan.safetensors").write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(card)}))
    done = bnlab("predict", "nan.safetensors", data / "val", "--json")
    assert (done.status, done.out) == (2, "")
    assert done.complaint == "the classifier's probabilities are no finite numbers: train it again"


def test_a_pipe_among_photos_is_refused_and_not_read(bnlab: Command, trained: Path, data: Path) -> None:
    os.mkfifo(data / "val" / "ring" / "z.jpg")
    done = bnlab("evaluate", trained / "best.safetensors", data, "--json")
    assert json.loads(done.out)["refused"][0]["reason"] == "it is not a regular file"


def test_photos_it_was_trained_on_are_told(bnlab: Command, trained: Path) -> None:
    data = trained.parents[1] / "data"
    done = bnlab("evaluate", trained / "best.safetensors", data, "--split", "all", "--json")
    assert json.loads(done.out)["seen_in_training"] == 24
    assert "warning: 24 of 36 photos are among those it was trained on: the figures flatter it" in done.err
    assert json.loads(bnlab("evaluate", trained / "best.safetensors", data, "--json").out)["seen_in_training"] == 0
    shutil.copy(trained / "best.safetensors", "elsewhere.safetensors")
    Path("split.csv").write_text("path,class,split\n")  # some other list, that has nothing to do with it
    assert json.loads(bnlab("evaluate", "elsewhere.safetensors", data, "--json").out)["seen_in_training"] is None


def other_classifier(trained: Path, file: Path, order: tuple[int, ...] = (2, 0, 1), **of_card: object) -> Path:
    """The trained one with its classes in another order and another size."""
    from bnlab.classifier.file import load_network, save_classifier

    network, card = load_network(trained / "best.safetensors")
    with torch.no_grad():
        for tensor in (network.fc.weight, network.fc.bias):
            tensor.copy_(tensor[list(order)].clone())
    classes = tuple(card.classes[i] for i in order)
    changes = {"classes": classes, "view": replace(card.preprocessing, size=40)} | of_card
    file.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(file, network, replace(card, **changes))
    return file


def test_evaluating_with_crops(bnlab: Command, trained: Path) -> None:
    best, data = trained / "best.safetensors", trained.parents[1] / "data"
    plain, one = (json.loads(bnlab("evaluate", best, data, *some, "--json").out) for some in ((), ("--crops", 1)))
    assert list(plain) == [
        "split", "n", "top1", "top5", "top1_interval", "ece", "classes", "per_class", "confusion", "refused",
        "crops", "seen_in_training", "classifier", "data", "folder", "versions",
    ]  # fmt: skip
    assert one | {"folder": ""} == plain | {"folder": ""}
    assert plain["crops"] == 1
    table = bnlab("evaluate", best, data).out
    assert table.splitlines()[1].startswith("top-1                    ")
    for number in (10, 144):
        done = bnlab("evaluate", best, data, "--crops", number, "--name", f"of{number}")
        assert done.out.splitlines()[1].rstrip() == f"averaged over            {number} crops of each photo"
        document = json.loads(Path(f"runs/of{number}/evaluation.json").read_text("utf-8"))
        assert (document["crops"], document["n"]) == (number, 12)
        assert document["ece"] != plain["ece"]
        page = Path(f"runs/of{number}/report.html").read_text("utf-8")
        assert f"bn_small_inception, 32 px; the mean of {number} crops of each photo" in page
    assert "crops of each photo" not in Path("runs/evaluate/report.html").read_text("utf-8")


def test_evaluating_an_ensemble(bnlab: Command, trained: Path) -> None:
    best, data = trained / "best.safetensors", trained.parents[1] / "data"
    other = other_classifier(trained, Path("other.safetensors"))
    alone = [json.loads(bnlab("evaluate", file, data, "--json").out) for file in (best, other)]
    document = json.loads(bnlab("evaluate", best, other, data, "--json").out)
    assert document["members"] == [
        {"classifier": str(file), "top1": one["top1"]} for file, one in zip((best, other), alone, strict=True)
    ]
    assert document["classes"] == alone[0]["classes"] == ["disc", "ring", "stripes"]
    assert alone[1]["classes"] == ["stripes", "disc", "ring"]
    assert "classifier" not in document
    assert document["n"] == sum(map(sum, document["confusion"])) == 12
    done = bnlab("evaluate", best, other, data, "--crops", 10, "--name", "both")
    lines = done.out.splitlines()
    assert lines[1].split() == ["averaged", "over", "10", "crops", "of", "each", "photo"]
    assert [line.split()[-1] for line in lines[2:4]] == [str(best), "other.safetensors"]
    assert all(line.startswith("top-1 alone ") for line in lines[2:4])
    assert lines[4].startswith("top-1 of the 2 together  ")
    page = Path("runs/both/report.html").read_text("utf-8")
    assert "<h2>Members</h2>" in page
    assert page.count("other.safetensors") == 3  # in the title twice, and among the members
    assert "bn_small_inception, 32 px, bn_small_inception, 40 px; the mean of 10 crops of each photo" in page

    stranger = other_classifier(trained, Path("stranger.safetensors"), classes=("disc", "ring", "lily"))
    assert bnlab("evaluate", best, stranger, data).complaint == (
        f"{best} knows the class 'stripes' and stranger.safetensors does not: give classifiers of the same classes"
    )


def test_photos_that_any_member_was_trained_on_are_told(bnlab: Command, trained: Path) -> None:
    best, data = trained / "best.safetensors", trained.parents[1] / "data"
    copied = other_classifier(trained, Path("elsewhere/copy.safetensors"))  # of a split that lies beside the first
    unknown = other_classifier(trained, Path("elsewhere/unknown.safetensors"), split_sha256="0" * 64)

    def seen(*files: Path, split: str = "all") -> int | None:
        done = bnlab("evaluate", *files, data, "--split", split, "--json")
        found: int | None = json.loads(done.out)["seen_in_training"]
        told = "warning: 24 of 36 photos are among those its members were trained on: the figures flatter it"
        assert (told in done.err) == bool(found)
        return found

    assert seen(best, copied) == seen(copied, best) == 24
    assert seen(best, unknown) == seen(unknown, best) == 24
    assert seen(best, copied, split="val") == 0
    assert seen(best, unknown, split="val") is None
    assert seen(unknown, unknown) is None

    listed = [f"{p},{p.parent.name},train,{file_sha256(p)}\n" for p in sorted((data / "val").rglob("*.png"))]
    Path("third").mkdir()
    Path("third/split.csv").write_text("path,class,split,sha256\n" + "".join(listed))
    third = other_classifier(trained, Path("third/x.safetensors"), split_sha256=file_sha256("third/split.csv"))
    document = json.loads(bnlab("evaluate", best, third, data, "--split", "all", "--json").out)
    assert document["seen_in_training"] == 36  # each was trained on what the other was not


def test_what_is_odd_in_a_folder_is_told(bnlab: Command, photos: Path) -> None:
    shutil.copy(photos / "disc/disc000.png", photos / "stray.png")
    shutil.copytree(photos / "disc", photos / "ring" / "deep")
    shutil.copy(photos / "disc/disc000.png", photos / "disc" / "noname")
    (photos / "disc" / "notes.txt").touch()
    done = bnlab("split", photos, "--into", "data", "--val", 0.04)
    assert f"warning: left out 1 photo beside the classes in {photos}, in none of them" in done.err
    assert "warning: class 'ring' has sub-folders (deep): all below it is one class" in done.err
    assert "left out 2 other files: 1 with no suffix, 1 with .txt" in done.err
    assert "warning: val has no photo of class '" in done.err


def test_an_interrupted_demo_says_how_to_begin_anew(bnlab: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.errors import Interrupted

    def interrupted(*_: object, **__: object) -> None:
        raise Interrupted("x")

    monkeypatch.setattr("bnlab.training.run.train", interrupted)
    done = bnlab("demo")
    assert (done.status, done.complaint) == (
        130, "the demo was interrupted, and leaves runs/demo; begin it anew with: bnlab demo",
    )  # fmt: skip


def test_ctrl_c_is_status_130(bnlab: Command, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bnlab.commands import split

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(split, "write_split", interrupted)
    done = bnlab("split", photos, "--into", "data", "--val", 0.3)
    assert (done.status, done.complaint) == (130, "interrupted; every file is whole, as it was or as it should be")


def test_ctrl_c_in_a_training_says_how_to_go_on(data: Path) -> None:
    """As a terminal does it: SIGINT to the process."""
    words = [sys.executable, "-m", "bnlab", "train", "data", *map(str, QUICK), "--epochs", "500"]
    with subprocess.Popen(words, cwd=data.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (data.parent / "runs/train/state.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1].endswith(", and saved; go on with: bnlab train --resume --name train")
    assert "Traceback" not in err


@pytest.mark.slow
def test_the_demo_keeps_its_promise(bnlab: Command) -> None:
    """At least 97% on digits it never saw, in at most 90 seconds on two cores."""
    began = time.monotonic()
    done = bnlab("demo", "--json")
    assert done.status == 0
    assert time.monotonic() - began < 90
    twins = json.loads(done.out)["twins"]
    assert twins["with BN"]["test_top1"] >= 0.97
    assert twins["with BN"]["n"] > 300
    assert {"test_top1", "diverged"} <= twins["without BN"].keys()
    assert Path("runs/demo/report.html").read_text("utf-8").count("<svg") == 2
