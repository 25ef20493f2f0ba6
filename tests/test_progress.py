import logging

import pytest

from bnlab.progress import LoggedProgress, NullProgress


def test_it_keeps_warnings_and_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = NullProgress()
    with progress.task("training", 10, "photos") as task:
        task.advance(3, loss=0.5)
    progress.note("a note")
    progress.warn("a warning")
    assert progress.warnings == ["a warning"]
    assert capsys.readouterr() == ("", "")


def test_everything_is_forwarded_logged_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    inner = NullProgress()
    progress = LoggedProgress(inner)
    with caplog.at_level(logging.INFO, logger="bnlab"), progress.task("training", 10, "photos") as task:
        task.advance(3)
        progress.note("100% of a note")
        progress.warn("a %s warning")
    assert task is inner
    assert progress.warnings == inner.warnings == ["a %s warning"]
    logged = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert logged == [("bnlab", "INFO", "100% of a note"), ("bnlab", "WARNING", "a %s warning")]
