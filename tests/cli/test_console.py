import io
import logging
import time

import pytest
from rich.console import Console
from rich.progress import Task as RichTask

from bnlab.cli.console import ScreenProgress, only_the_screen
from bnlab.progress import LOG


def test_a_terminal_gets_bars_with_rate_and_end() -> None:
    file = io.StringIO()
    progress = ScreenProgress(Console(file=file, force_terminal=True, width=160))
    with progress.task("training", 200, "images", done=100) as task:
        for _ in range(5):
            task.advance(10, epoch=3, loss=1.23456)
            time.sleep(0.03)
            with progress.task("validating", 10, "photos") as inner:
                inner.advance(3)
        progress.bars.refresh()
    text = file.getvalue()
    for word in ("training", "150/200", "epoch 3", "loss 1.235", "images/s", "left, done at", "validating", "/10"):
        assert word in text
    assert not progress.bars.tasks


def test_a_log_gets_lines() -> None:
    now = [0.0]
    file = io.StringIO()
    progress = ScreenProgress(Console(file=file, width=160, get_time=lambda: now[0]))
    with progress.task("training", 1000, "images", done=500) as task:
        for _ in range(4):
            now[0] += 20
            task.advance(100, loss=0.5)
    with progress.task("quick", 1, "images") as task:
        task.advance()
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("training 700/1000  loss 0.5  5 images/s  0:01:00 left, done at ")
    assert lines[1].startswith("training 900/1000  loss 0.5  5 images/s  0:00:20 left, done at ")
    assert lines[2:] == ["training: 400 images in 80 s"]


@pytest.mark.parametrize("speed", [None, 0.0, 5e-324])
def test_a_rate_of_nothing_gives_no_error(speed: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    now, file = [0.0], io.StringIO()
    progress = ScreenProgress(Console(file=file, width=160, get_time=lambda: now[0]))
    monkeypatch.setattr(RichTask, "speed", speed)
    with progress.task("training", 100, "images") as task:
        now[0] += 31
        task.advance(0)
    line = file.getvalue().splitlines()[0]
    assert line.startswith("training 0/100")
    assert (" left" in line) == bool(speed)


def test_the_total_may_change() -> None:
    now = [0.0]
    file = io.StringIO()
    progress = ScreenProgress(Console(file=file, width=160, get_time=lambda: now[0]))
    with progress.task("training", 1000, "images") as task:
        for total in (1000, 1000, 500, 500):
            now[0] += 20
            task.advance(100, total)
    assert [line.split()[1] for line in file.getvalue().splitlines()[:2]] == ["200/1000", "400/500"]


def test_an_error_closes_its_bar() -> None:
    progress = ScreenProgress(Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="x"), progress.task("a", 1, "photos"):
        raise ValueError("x")
    assert not progress.bars.tasks
    assert not progress.bars.live.is_started


def test_notes_are_not_markup() -> None:
    file = io.StringIO()
    progress = ScreenProgress(Console(file=file, width=20))
    progress.note("a [red]name[/red] that is longer than the line")
    progress.warn("[b]")
    assert file.getvalue() == "a [red]name[/red] that is longer than the line\nwarning: [b]\n"


def test_logging_prints_nothing_next_to_the_screen(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [*LOG.handlers]
    with only_the_screen():
        LOG.warning("a")
    assert (caplog.records, capsys.readouterr().err) == ([], "")
    assert (LOG.propagate, LOG.handlers) == (True, handlers)
    logging.getLogger("bnlab").warning("b")
    assert [record.getMessage() for record in caplog.records] == ["b"]
