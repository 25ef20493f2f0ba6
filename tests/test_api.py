"""The functions of the package: signatures and help from the options, and what they refuse."""

import inspect
from pathlib import Path

import pytest

import bnlab
from bnlab.errors import DataError, RecipeError, UsageError
from bnlab.options import ImportOptions, SplitOptions, TrainOptions
from bnlab.progress import NullProgress


@pytest.mark.parametrize(
    ("function", "options"),
    [(bnlab.split, SplitOptions), (bnlab.train, TrainOptions), (bnlab.import_weights, ImportOptions)],
)
def test_signature_and_help_are_those_of_the_options(function: object, options: type[SplitOptions]) -> None:
    signature, text = inspect.signature(function), inspect.getdoc(function)  # type: ignore[arg-type]
    for name, field in options.model_fields.items():
        if name == "recipe_keys":
            assert signature.parameters["options"].kind is inspect.Parameter.VAR_KEYWORD
            continue
        assert f"\n    {name}: " in str(text)
        if not field.is_required() and name != "data":
            assert signature.parameters[name].default == field.default
    positional = [p.name for p in signature.parameters.values() if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert positional == {"split": ["photos", "into"], "train": ["data"]}.get(function.__name__, ["file", "output"])


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


def test_unknown_keywords_get_the_nearest_name(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no key 'vall': did you mean 'val'"):
        bnlab.split(photos, tmp_path / "data", vall=0.2)
    with pytest.raises(RecipeError, match=r"no key 'epoch'.*did you mean 'epochs'"):
        bnlab.train(photos, epoch=3)
    with pytest.raises(RecipeError, match="no key 'recipe_keys'"):
        bnlab.train(photos, recipe_keys={"epochs": 3})
    assert not (tmp_path / "data").exists()


def test_values_out_of_range_are_refused(photos: Path) -> None:
    with pytest.raises(RecipeError, match="epochs is 0"):
        bnlab.train(photos, epochs=0)
    with pytest.raises(DataError, match="nowhere"):
        bnlab.train("nowhere", runs=photos / "runs")


def test_warnings_reach_the_progress_that_is_passed(photos: Path, tmp_path: Path) -> None:
    progress = NullProgress()
    (photos / "disc" / "bad.jpg").write_text("text")
    bnlab.split(photos, tmp_path / "data", val=0.3, progress=progress)
    assert any("bad.jpg" in warning for warning in progress.warnings)
