import csv
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from tests.conftest import Outcome

Command = Callable[..., Outcome]
VERBS = ("split", "train", "evaluate", "predict", "demo", "net", "import")


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
