"""`bnlab evaluate`: documents and files, crops, ensembles, and photos that were trained on."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from bnlab.classifier.seen import SeenPhotos
from bnlab.data.photos import Photo, Photos
from bnlab.files import file_sha256
from tests.conftest import Outcome

Command = Callable[..., Outcome]


def test_a_run_can_be_evaluated_by_its_folder(bnlab: Command, trained: Path) -> None:
    done = bnlab("evaluate", trained / "best.safetensors", trained, "--json")
    assert (json.loads(done.out)["split"], json.loads(done.out)["n"]) == ("val", 12)


def test_a_pipe_among_photos_is_refused_and_not_read(bnlab: Command, trained: Path, data: Path) -> None:
    os.mkfifo(data / "val" / "ring" / "z.jpg")
    done = bnlab("evaluate", trained / "best.safetensors", data, "--json")
    assert json.loads(done.out)["refused"][0]["reason"] == "it is not a regular file"


@pytest.mark.usefixtures("without_pictures")
def test_folders_that_cannot_be_read_are_named(bnlab: Command, trained: Path, data: Path, locked: str) -> None:
    """Those of the split that is evaluated, and no others."""
    for split in ("val", "train"):
        (data / split / "ring" / locked).mkdir()
    done = bnlab("evaluate", trained / "best.safetensors", data, "--json")
    refused = [{"path": str(data / "val/ring" / locked), "reason": "it cannot be read (Permission denied)"}]
    assert json.loads(done.out)["refused"] == refused
    assert done.err.count("left out") == 1
    done = bnlab("evaluate", trained / "best.safetensors", data / "val", "--strict")
    assert done.complaint.startswith("1 folder cannot be used (the first: ")


@pytest.mark.usefixtures("without_pictures")
def test_a_jpeg_without_its_end_is_reported_and_a_photo_that_is_too_large_refused(
    bnlab: Command, trained: Path, data: Path
) -> None:
    with Image.open(data / "val/ring/ring101.png") as image:
        image.save(data / "val/ring/cut.jpg")
    (data / "val/ring/cut.jpg").write_bytes((data / "val/ring/cut.jpg").read_bytes()[:-3])
    done = bnlab("evaluate", trained / "best.safetensors", data, "--json")
    assert (json.loads(done.out)["n"], json.loads(done.out)["refused"]) == (13, [])
    assert done.err.replace("\n", "").count("cut.jpg is missing") == 1
    refused = bnlab("evaluate", trained / "best.safetensors", data, "--max-megapixels", 0.001)
    assert (refused.status, "max_megapixels" in refused.complaint) == (2, True)


@pytest.mark.usefixtures("without_pictures")
def test_photos_it_was_trained_on_are_reported(bnlab: Command, trained: Path) -> None:
    data = trained.parents[1] / "data"
    done = bnlab("evaluate", trained / "best.safetensors", data, "--split", "all", "--json")
    assert seen(done) == (24, 12)
    assert "warning: 24 of 36 photos are among those it was trained on" in done.err
    shutil.copy(trained / "best.safetensors", "elsewhere.safetensors")  # without the split.csv of its run
    done = bnlab("evaluate", "elsewhere.safetensors", data, "--json")
    assert seen(done) == (0, 12)
    assert "12 of 12 photos are among those by which it was chosen as the best epoch" in done.err
    assert "warning" not in done.err


@pytest.mark.usefixtures("without_pictures")
def test_of_imported_weights_and_older_files_it_is_unknown_what_they_saw(bnlab: Command, trained: Path) -> None:
    unknown = other_classifier(trained, Path("unknown.safetensors"), seen=SeenPhotos())
    done = bnlab("evaluate", unknown, trained.parents[1] / "data", "--json")
    assert seen(done) == (None, None)
    assert "which photos it was trained on is unknown" in done.err


def test_the_report_says_which_photos_were_seen(bnlab: Command, trained: Path) -> None:
    bnlab("evaluate", trained / "best.safetensors", trained.parents[1] / "data", "--split", "all")
    page = Path("runs/evaluate/report.html").read_text("utf-8")
    assert "24 of 36 photos are among those it was trained on." in page
    assert "12 of 36 photos are among those by which it was chosen as the best epoch." in page


def seen(done: Outcome) -> tuple[int | None, int | None]:
    document = json.loads(done.out)
    return document["seen_in_training"], document["seen_in_validation"]


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures and the page, which take most of the time."""
    monkeypatch.setattr("bnlab.commands.evaluate.render", lambda *_, **__: "")
    monkeypatch.setattr("bnlab.commands.evaluate.mistakes_png", lambda *_: b"")
    for figure in ("confusion_png", "reliability_png"):
        monkeypatch.setattr(f"bnlab.commands.evaluate.figures.{figure}", lambda *_: b"")


def other_classifier(trained: Path, file: Path, order: tuple[int, ...] = (2, 0, 1), **of_card: object) -> Path:
    """The trained classifier with its classes in another order and another size."""
    from bnlab.classifier.file import load_network, save_classifier

    network, card = load_network(trained / "best.safetensors")
    with torch.no_grad():
        for tensor in (network.fc.weight, network.fc.bias):
            tensor.copy_(tensor[list(order)].clone())
    classes = tuple(card.classes[i] for i in order)
    changes = {"classes": classes, "preprocessing": replace(card.preprocessing, size=40)} | of_card
    file.parent.mkdir(parents=True, exist_ok=True)
    save_classifier(file, network, replace(card, **changes))
    return file


def test_the_document(bnlab: Command, trained: Path) -> None:
    best, data = trained / "best.safetensors", trained.parents[1] / "data"
    plain, one = (json.loads(bnlab("evaluate", best, data, *some, "--json").out) for some in ((), ("--crops", 1)))
    assert list(plain) == [
        "split", "n", "top1", "top5", "top1_interval", "ece", "classes", "per_class", "confusion", "refused",
        "crops", "seen_in_training", "seen_in_validation", "classifier", "data", "folder", "versions",
    ]  # fmt: skip
    assert one | {"folder": ""} == plain | {"folder": ""}
    assert plain["crops"] == 1
    correct = sum(plain["confusion"][i][i] for i in range(3))
    assert (plain["split"], plain["n"], plain["classes"]) == ("val", 12, ["disc", "ring", "stripes"])
    assert plain["top1"] == pytest.approx(correct / sum(map(sum, plain["confusion"])))
    assert list(plain["per_class"][0]) == ["label", "n", "precision", "recall", "f1"]
    table = bnlab("evaluate", best, data).out
    assert table.splitlines()[1].startswith("top-1                    ")
    files = {path.name for path in Path("runs/evaluate").iterdir()}
    assert files >= {"evaluation.json", "predictions.csv", "confusion.png", "reliability.png", "report.html"}
    assert "crops of each photo" not in Path("runs/evaluate/report.html").read_text("utf-8")


@pytest.mark.parametrize("number", [10, pytest.param(144, marks=pytest.mark.slow)])
def test_answers_for_crops_are_averaged(bnlab: Command, trained: Path, number: int) -> None:
    best, data = trained / "best.safetensors", trained.parents[1] / "data"
    plain = json.loads(bnlab("evaluate", best, data, "--json").out)
    done = bnlab("evaluate", best, data, "--crops", number, "--name", f"of{number}")
    assert done.out.splitlines()[1].rstrip() == f"averaged over            {number} crops of each photo"
    document = json.loads(Path(f"runs/of{number}/evaluation.json").read_text("utf-8"))
    assert (document["crops"], document["n"]) == (number, 12)
    assert document["ece"] != plain["ece"]
    page = Path(f"runs/of{number}/report.html").read_text("utf-8")
    assert f"bn_small_inception, 32 px; the mean of {number} crops of each photo" in page


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
    complaint = bnlab("evaluate", best, stranger, data).complaint
    for fragment in (str(best), "'stripes'", "stranger.safetensors", "classifiers of the same classes"):
        assert fragment in complaint


@pytest.mark.usefixtures("without_pictures")
def test_photos_that_any_member_was_trained_on_are_reported(bnlab: Command, trained: Path) -> None:
    best, data = trained / "best.safetensors", trained.parents[1] / "data"
    copied = other_classifier(trained, Path("elsewhere/copy.safetensors"))
    unknown = other_classifier(trained, Path("elsewhere/unknown.safetensors"), seen=SeenPhotos())

    def trained_on(*files: Path, split: str = "all") -> int | None:
        done = bnlab("evaluate", *files, data, "--split", split, "--json")
        found = seen(done)[0]
        assert ("24 of 36 photos are among those its members were trained on" in done.err) == bool(found)
        return found

    assert trained_on(best, copied) == trained_on(copied, best) == 24
    assert trained_on(best, unknown) == trained_on(unknown, best) == 24
    assert trained_on(best, copied, split="val") == 0
    assert trained_on(best, unknown, split="val") is None
    assert trained_on(unknown, unknown) is None

    listed = [Photo(str(p), p.parent.name, "train", file_sha256(p)) for p in sorted((data / "val").rglob("*.png"))]
    third = other_classifier(trained, Path("third/x.safetensors"), seen=SeenPhotos.of(Photos.of(listed)))
    done = bnlab("evaluate", best, third, data, "--split", "all", "--json")
    assert seen(done) == (36, 0)  # each was trained on what the other was not
