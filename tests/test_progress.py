import pytest

from bnlab.progress import NullProgress


def test_it_keeps_warnings_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = NullProgress()
    with progress.task("training", 10, "photos") as task:
        task.advance(3, loss=0.5)
    progress.note("a note")
    progress.warn("a warning")
    assert progress.warnings == ["a warning"]
    assert capsys.readouterr() == ("", "")
