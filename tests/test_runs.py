from pathlib import Path

import pytest

from bnlab.errors import RunError, StorageError, UsageError
from bnlab.runs import RUNS, Run, check_free, find_run, new_run


def test_runs_are_numbered(tmp_path: Path) -> None:
    assert [new_run(tmp_path, None).name for _ in range(3)] == ["train", "train2", "train3"]


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path, "mine")
    run.recipe.write_text("{}")
    with pytest.raises(
        RunError, match=r"mine exists already: pass another name, or .*: bnlab\.resume\('mine', runs='/"
    ):
        new_run(tmp_path, "mine")


def test_a_run_where_the_command_line_looks_is_resumed_by_a_command() -> None:
    assert Run(RUNS / "a b").resume_command() == "bnlab train --resume --name 'a b'"
    assert Run(RUNS / "a").resume_command("DATA") == "bnlab train DATA --resume --name a"
    assert Run(Path("x/a")).resume_command("DATA") == "bnlab.resume('a', data=DATA, runs='x')"


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_a_path_is_not_a_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not valid as the name of a run"):
        new_run(tmp_path, name)


def test_the_latest_run_is_found(tmp_path: Path) -> None:
    import os

    with pytest.raises(RunError, match=r"there is no run to resume in .*: begin one with `bnlab train DATA`"):
        find_run(tmp_path, None)
    for number, name in enumerate(("b", "a")):
        run = new_run(tmp_path, name)
        run.recipe.write_text("{}")
        os.utime(run.recipe, (number, number))
    assert find_run(tmp_path, None).name == "a"
    assert find_run(tmp_path, "b").name == "b"
    with pytest.raises(RunError, match=r"there is no run .*aa: did you mean 'a'"):
        find_run(tmp_path, "aa")


def test_a_run_belongs_to_one_training(tmp_path: Path) -> None:
    run = new_run(tmp_path, None)
    with run.locked(), pytest.raises(RunError, match=r"is in use by another training: .*another name"), run.locked():
        pass
    with run.locked():
        pass


def test_a_training_killed_before_its_recipe_leaves_the_name_free(tmp_path: Path) -> None:
    run = new_run(tmp_path, "mine")
    with run.locked():
        pass
    run.split.write_text("path,class,split,sha256\n")
    check_free(tmp_path, "mine")
    (run.folder / "notes.txt").write_text("of the user")
    with pytest.raises(RunError, match="exists already: pass another name"):
        check_free(tmp_path, "mine")


def test_files_lie_in_the_folder(tmp_path: Path) -> None:
    run = Run(tmp_path / "train")
    assert run.name == "train"
    assert (run.best, run.state) == (tmp_path / "train" / "best.safetensors", tmp_path / "train" / "state.pt")


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file cannot be written"):
        new_run(tmp_path / "file", None)
