from pathlib import Path

import pytest

from bnlab.errors import RunError, UsageError
from bnlab.runs import find_run, new_run


def test_runs_are_numbered(tmp_path: Path) -> None:
    assert [new_run(tmp_path, None).name for _ in range(3)] == ["train", "train2", "train3"]


def test_a_taken_name_is_refused(tmp_path: Path) -> None:
    run = new_run(tmp_path, "mine")
    run.recipe.write_text("{}")
    with pytest.raises(
        RunError, match=r"mine exists already: take another --name, or go on with it: --resume --name mine"
    ):
        new_run(tmp_path, "mine")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ""])
def test_a_name_is_no_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="a run cannot be named"):
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
    with run.locked(), pytest.raises(RunError, match="is in use by another training: wait for it"), run.locked():
        pass
    with run.locked():
        pass
