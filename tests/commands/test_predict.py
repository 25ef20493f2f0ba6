"""`bnlab predict`: document, CSV file and picture, and classifiers that cannot answer."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from bnlab import UsageError, predict
from tests.conftest import Outcome

Command = Callable[..., Outcome]


def test_the_document(bnlab: Command, data: Path, trained: Path) -> None:
    (data / "x.jpg").write_text("text")
    given = [data / "val/ring/ring101.png", data / "x.jpg", data / "val/disc/disc100.png"]
    done = bnlab("predict", trained / "best.safetensors", *given, "--top", 2, "--json")
    document = json.loads(done.out)
    assert done.status == 0
    assert [one["path"] for one in document] == [str(path) for path in given]
    assert list(document[0]) == ["path", "label", "probability", "top", "error"]
    assert document[0]["error"] is None
    assert document[0]["top"][0] == {"label": document[0]["label"], "probability": document[0]["probability"]}
    assert len(document[0]["top"]) == 2
    assert document[1] == {
        "path": str(data / "x.jpg"), "label": None, "probability": None, "top": [],
        "error": "it is not an image that Pillow can read",
    }  # fmt: skip


def test_folders_that_cannot_be_read_or_are_of_the_system(
    bnlab: Command, data: Path, trained: Path, locked: str
) -> None:
    where = data / "val/ring"
    for name in (locked, "@eaDir"):
        (where / name).mkdir()
    (where / "@eaDir" / "thumbnail.jpg").touch()
    done = bnlab("predict", trained / "best.safetensors", where, "--json")
    assert len(json.loads(done.out)) == 4
    assert f"warning: left out {where}/{locked}: it cannot be read (Permission denied)" in done.err
    assert f"warning: left out 1 folder of the system: {where}/@eaDir" in done.err
    strict = bnlab("predict", trained / "best.safetensors", where, "--strict")
    assert (strict.status, strict.complaint.split(" (")[0]) == (2, "1 folder cannot be used")
    none = bnlab("predict", trained / "best.safetensors", where / locked)
    assert f"{locked} has no photos ({where}/{locked}: it cannot be read (Permission denied))" in none.complaint


@pytest.mark.parametrize(("top", "warned"), [(3, False), (4, True), (5, False)])  # 5 is the default
def test_more_answers_than_classes_are_named(bnlab: Command, data: Path, trained: Path, top: int, warned: bool) -> None:
    done = bnlab("predict", trained / "best.safetensors", data / "val/ring/ring100.png", "--top", top)
    assert ("warning: top 4 has the effect of top 3: the classifier has 3 classes" in done.err) == warned


def test_a_csv_file_that_cannot_be_written(bnlab: Command, data: Path, trained: Path) -> None:
    Path("afile").write_text("mine")
    done = bnlab("predict", trained / "best.safetensors", data / "val", "--csv", "afile/p.csv")
    assert done.complaint.startswith("afile/p.csv cannot be written (")
    assert done.status == 2


def test_predictions_as_csv_and_picture(bnlab: Command, data: Path, trained: Path, tmp_path: Path) -> None:
    given = data / "val/ring"
    done = bnlab("predict", trained / "best.safetensors", given, "--csv", "out/p.csv", "--top", 2, "--show")
    assert done.status == 0
    with (tmp_path / "out/p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "probability", "error", "label2", "probability2"]
    assert len(rows) == 4
    assert done.out.splitlines()[-1].startswith("runs/predict/predictions.png")
    with Image.open(tmp_path / "runs/predict/predictions.png") as picture:
        assert picture.width > 500
    before = (tmp_path / "out/p.csv").read_bytes()
    assert bnlab("predict", trained / "best.safetensors", given, "--csv", "out/p.csv").complaint.startswith(
        "out/p.csv exists already: "
    )
    assert (tmp_path / "out/p.csv").read_bytes() == before
    done = bnlab("predict", trained / "best.safetensors", given / "ring100.png", "--show")
    assert done.out.splitlines()[-1].startswith("runs/predict2/predictions.png")


def test_a_classifier_from_the_future(bnlab: Command, trained: Path, tmp_path: Path) -> None:
    content = (trained / "best.safetensors").read_bytes()
    old, new = rb"{\"format\": 2,", rb"{\"format\": 9,"
    assert content.count(old) == 1
    (tmp_path / "new.safetensors").write_bytes(content.replace(old, new))
    complaint = bnlab("predict", "new.safetensors", trained.parents[1] / "data").complaint
    assert complaint.startswith("new.safetensors was written by a newer bnlab")
    assert "format 9" in complaint
    assert "upgrade bnlab" in complaint


def test_broken_weights_give_no_answer(bnlab: Command, trained: Path, data: Path) -> None:
    import safetensors.torch

    from bnlab.classifier.file import read_classifier, to_json

    tensors, card = read_classifier(trained / "best.safetensors")
    tensors["fc.bias"].fill_(float("nan"))
    Path("nan.safetensors").write_bytes(safetensors.torch.save(tensors, {"bnlab": to_json(card)}))
    done = bnlab("predict", "nan.safetensors", data / "val", "--json")
    assert (done.status, done.out) == (2, "")
    assert "finite" in done.complaint
    assert "train it again" in done.complaint


def test_a_jpeg_without_its_end_and_the_limit_of_pixels(bnlab: Command, data: Path, trained: Path) -> None:
    photo = data / "x.jpg"
    with Image.open(data / "val/ring/ring101.png") as image:
        image.save(photo)
    photo.write_bytes(photo.read_bytes()[:-3])
    done = bnlab("predict", trained / "best.safetensors", photo)
    assert done.status == 0
    assert done.err.replace("\n", "").count("x.jpg is missing") == 1
    refused = bnlab("predict", trained / "best.safetensors", photo, "--max-megapixels", 0.001)
    assert (refused.status, "40 x 40 pixels" in refused.complaint) == (2, True)


def test_a_picture_of_photos_in_memory(data: Path, trained: Path, tmp_path: Path) -> None:
    path = data / "val/ring/ring100.png"
    contents = [path.read_bytes(), io.BytesIO(path.read_bytes()), Image.open(path), b"no picture", str(path)]
    result = predict(trained, iter(contents), show=True, runs=tmp_path / "shown")
    assert [prediction.path for prediction in result] == [*(f"photo {i}" for i in range(1, 5)), str(path)]
    assert result.picture is not None and result.picture.is_file()
    assert [refusal.path for refusal in result.refused] == ["photo 4"]


def test_none_is_not_a_photo(trained: Path) -> None:
    with pytest.raises(UsageError, match="predict takes photos, not None"):
        predict(trained, None)  # type: ignore[arg-type]
