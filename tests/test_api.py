"""The functions of the package: what they give, write, warn of and refuse."""

import io
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bnlab
from bnlab.classifier.predict import Prediction
from bnlab.commands.predict import PredictResult
from bnlab.data.scan import Refusal
from bnlab.errors import ClassifierError, DataError, PhotoError, RecipeError, UsageError
from bnlab.progress import NullProgress
from tests.conftest import write_photos


def test_split_splits(photos: Path, tmp_path: Path) -> None:
    result = bnlab.split(str(photos), tmp_path / "data", val=0.25, how="list")
    assert result.written
    assert result.folder == tmp_path / "data"
    assert sum(result.counts["disc"].values()) == 12
    assert result.counts["disc"]["val"] > 0
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["split.csv"]


def test_a_split_names_its_duplicates_and_what_is_refused(photos: Path, tmp_path: Path) -> None:
    copy, bad = photos / "ring" / "copy.png", photos / "ring" / "bad.png"
    copy.write_bytes((photos / "disc" / "disc000.png").read_bytes())
    bad.touch()
    result = bnlab.split(photos, tmp_path / "data", val=0.3)
    (group,) = result.duplicates
    assert group.paths == [str(photos / "disc" / "disc000.png"), str(copy)]
    assert (group.labels, group.exact) == (["disc", "ring"], True)
    assert result.label_conflicts == [group]
    assert [(each.path, each.label) for each in result.refused] == [(str(bad), "ring")]
    assert len(result.photos) == 37


def test_a_split_prints_as_one_line_however_many_photos_it_has(photos: Path, tmp_path: Path) -> None:
    (photos / "ring" / "bad.png").touch()
    result = bnlab.split(photos, tmp_path / "a\nb", val=0.3, how="list")
    parts = ", ".join(f"{sum(count[split] for count in result.counts.values())} {split}" for split in ("train", "val"))
    shown = f"{tmp_path}/a\\nb, 3 classes, 36 photos, {parts}, 1 photo left out, 1 warning"
    assert repr(result) == f"<SplitResult {shown}>"
    assert len(repr(result.split)) < 200


def test_predictions_print_as_one_line_with_their_most_frequent_classes() -> None:
    def predicted(label: str, times: int) -> list[Prediction]:
        return [Prediction("x", label, 0.5, ())] * times

    refused = (Refusal("x", "it is empty"), Refusal("y", "it cannot be read", is_folder=True))
    broken = Prediction("x", None, None, (), "it is empty")
    few = PredictResult(predictions=[*predicted("rose", 1), *predicted("tulip", 2), broken], refused=refused)
    assert repr(few) == "<PredictResult 4 photos, 2 tulip, 1 rose, 1 photo and 1 folder left out>"
    many = PredictResult(predictions=[one for label in "abcdefg" for one in predicted(label, 1000)])
    assert (
        repr(many) == f"<PredictResult 7000 photos, {', '.join(f'1000 {c}' for c in 'abcde')}, 2000 of other classes>"
    )


def test_evaluate_names_what_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no classifier: pass a classifier file"):
        bnlab.evaluate([], tmp_path)
    with pytest.raises(UsageError, match="evaluate has no argument classifiers: pass the list as classifier"):
        bnlab.evaluate("a.safetensors", tmp_path, classifiers=[])  # type: ignore[call-arg]


def test_values_out_of_range_are_refused(photos: Path) -> None:
    with pytest.raises(RecipeError, match="epochs is 0"):
        bnlab.train(photos, epochs=0)
    with pytest.raises(DataError, match="nowhere"):
        bnlab.train("nowhere", runs=photos / "runs")


def test_warnings_reach_logging_the_progress_and_the_result(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = NullProgress()
    (photos / "disc" / "bad.jpg").write_text("text")
    (photos / "disc" / "notes.txt").write_text("text")
    with caplog.at_level(logging.INFO, logger="bnlab"):
        result = bnlab.split(photos, tmp_path / "data", val=0.3, progress=progress)
    assert [warning for warning in result.warnings if "bad.jpg" in warning]
    assert list(result.warnings) == progress.warnings
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == list(result.warnings)
    assert any("other file" in r.getMessage() for r in caplog.records if r.levelname == "INFO")
    assert {r.name for r in caplog.records} == {"bnlab"}
    ((refusal),) = result.refused
    assert (Path(refusal.path).name, refusal.label) == ("bad.jpg", "disc")
    assert "Pillow" in refusal.reason
    assert capsys.readouterr().out == ""


def test_warnings_are_printed_once_unless_logging_is_configured(photos: Path, tmp_path: Path) -> None:
    """By a library call, and by the command line."""
    (photos / "disc" / "bad.jpg").write_text("text")
    library = f"import bnlab; bnlab.split({str(photos)!r}, {str(tmp_path / 'a')!r}, val=0.3)"
    command = "import logging, sys; from bnlab.__main__ import main; logging.basicConfig(); "
    command += f"main(['split', {str(photos)!r}, '--into', {str(tmp_path / 'b')!r}, '--val', '0.3'])"
    for script in (library, command):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stderr.count("bad.jpg") == 1, done.stderr


def test_a_training_has_its_classifier_and_its_warnings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "data"
    write_photos(data / "train", each=4)
    write_photos(data / "val", each=2, first=100)
    shutil.copy(data / "train" / "disc" / "disc000.png", data / "val" / "disc" / "copy.png")
    (data / "train" / "ring" / "bad.jpg").write_text("text")
    few = {"network": "bn_mlp", "size": 32, "width": 0.25, "batch_size": 4, "workers": 0, "bn_monitor": False}
    result = bnlab.train(data, runs=tmp_path / "runs", epochs=1, **few)
    assert any("identical to the byte" in warning for warning in result.warnings)
    assert [(Path(r.path).name, r.label) for r in result.refused] == [("bad.jpg", "ring")]
    best = bnlab.Classifier.load(result.run.best, "cpu").network.state_dict()
    assert all(torch.equal(best[key], value) for key, value in result.classifier.network.state_dict().items())
    assert len(caplog.records) == len(result.warnings)
    again = bnlab.resume(runs=tmp_path / "runs", workers=0)
    assert again.refused == result.refused
    assert again.val_top1 == result.val_top1

    left_out = "1 photo left out, 2 warnings>"
    assert len(result.warnings) == 2
    line = rf"<TrainingResult {tmp_path}/runs/train, val top-1 \S+% \(n = 7\), 1 epoch, \d+ s, {left_out}"
    assert re.fullmatch(line, repr(result))
    assert re.fullmatch(r"<Evaluation val, n = 7, 3 classes, top-1 \S+%>", repr(result.evaluation))

    seen = bnlab.evaluate(result.classifier, data, batch_size=4)
    assert re.fullmatch(r"<EvaluateResult val, n = 7, 3 classes, top-1 \S+%, 2 warnings>", repr(seen))
    assert (seen.seen.train, seen.seen.val, seen.seen.n) == (1, 6, 7)
    assert any("trained on" in warning for warning in seen.warnings)
    assert seen.folder is None
    assert seen.to_json()["folder"] is None
    found = bnlab.find_lr(data, runs=tmp_path / "runs", **few)
    assert (found.figure, found.table, found.to_json()["figure"]) == (None, None, None)
    assert [Path(refusal.path).name for refusal in found.refused] == ["bad.jpg"]
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"train"}
    assert re.fullmatch(r"<FindLrResult (suggested|no learning rate) .*\(.*\), 1 photo left out.*>", repr(found))
    assert len(repr(found.test.curve)) < 100


def test_photos_of_a_list_whose_end_is_missing_are_warned_of(tmp_path: Path) -> None:
    """They were opened when the list was written, so that only the loader opens them."""
    write_photos(tmp_path / "photos", each=6)
    for i, folder in enumerate((tmp_path / "photos").iterdir()):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "JPEG")
        (folder / "truncated.jpg").write_bytes(content.getvalue()[:-20])
    split = bnlab.split(tmp_path / "photos", into=tmp_path / "data", val=0.3)
    few = {"network": "bn_mlp", "size": 32, "width": 0.25, "batch_size": 4, "workers": 0, "bn_monitor": False}
    found = bnlab.find_lr(tmp_path / "data", **few)
    trained = bnlab.train(tmp_path / "data", runs=tmp_path / "runs", epochs=1, **few)
    for result in (split, found, trained):
        assert any("the end of" in warning for warning in result.warnings)


def test_evaluating_and_predicting_write_what_is_asked_for_only(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, file = trained.parents[1] / "data", trained / "best.safetensors"
    classifier = bnlab.Classifier.load(file)
    by_file = bnlab.evaluate(file, data)
    for given in (str(file), trained, classifier, [file], bnlab.Ensemble([classifier])):
        found = bnlab.evaluate(given, data, split="val")
        assert (found.evaluation.probabilities == by_file.evaluation.probabilities).all()
        assert (found.seen.train, found.seen.val, found.warnings, found.refused) == (0, 12, (), ())
    two = bnlab.evaluate([file, classifier], data)
    assert [member.classifier for member in two.evaluation.members] == [str(file)] * 2
    np.testing.assert_allclose(two.evaluation.probabilities, by_file.evaluation.probabilities, atol=1e-6)
    (tmp_path / "bad.jpg").write_text("text")
    result = bnlab.predict(classifier, [data / "val" / "ring", "bad.jpg"], top=1)
    assert len(result) == 5
    assert [prediction.error is None for prediction in result] == [True] * 4 + [False]
    assert list(result)[:4] == classifier.predict([one.path for one in result][:4], top=1)
    assert [refusal.path for refusal in result.refused] == ["bad.jpg"]
    assert "bad.jpg" in result.warnings[0]
    assert len(bnlab.predict(classifier, data / "val" / "ring")) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"bad.jpg"}
    assert bnlab.evaluate(file, data, name="a").folder == Path("runs/a")
    assert {path.name for path in Path("runs").iterdir()} == {"a"}


def test_what_cannot_be_evaluated_or_predicted(trained: Path, tmp_path: Path) -> None:
    file = trained / "best.safetensors"
    (tmp_path / "bad.jpg").write_text("text")
    with pytest.raises(PhotoError):
        bnlab.predict(file, [tmp_path / "bad.jpg"])
    with pytest.raises(DataError, match="no photo"):
        bnlab.predict(file, [tmp_path / "none.jpg"])
    with pytest.raises(ClassifierError, match="no classifier file"):
        bnlab.evaluate(tmp_path / "none.safetensors", tmp_path)
    with pytest.raises(UsageError, match="crops is 5"):
        bnlab.evaluate(file, tmp_path, crops=5)  # type: ignore[arg-type]
    assert list(bnlab.predict(file, [])) == []


def test_paths_are_text_or_path_objects(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        bnlab.train(tmp_path / "none", init=trained / "best.safetensors", runs=tmp_path)
    (tmp_path / "mine.yaml").write_text("epochs: 0")
    with pytest.raises(RecipeError, match="epochs is 0"):
        bnlab.train(tmp_path, recipe=tmp_path / "mine.yaml")


def test_the_package_lists_its_names_and_loads_no_torch() -> None:
    script = (
        "import sys, bnlab; bnlab.split, bnlab.UsageError; assert 'torch' not in sys.modules; from bnlab import *; "
    )
    script += "assert {*bnlab.__all__} <= {*dir(bnlab)} & {*globals()}; print(train.__name__, Classifier.__name__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "train Classifier\n"
    assert {name for name in vars(bnlab.errors) if name.endswith("Error")} <= {*bnlab.__all__}
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        bnlab.tarin  # type: ignore[attr-defined]  # noqa: B018
