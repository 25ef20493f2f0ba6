import itertools
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from bnlab.errors import Interrupted
from bnlab.training import loop
from tests.training.test_run import resumed, trained_on


def test_tensorboard_keeps_every_epoch_through_resumes(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    real, epochs = loop.record_validation, itertools.count(1)

    def interrupted(*arguments: Any) -> object:
        if next(epochs) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after epoch 2, and saved"):
        patch.setattr(loop, "record_validation", interrupted)
        trained_on(data, epochs=3)
    for _ in range(2):  # the second time it is complete
        resumed(data.parent)
    events = EventAccumulator(str(data.parent / "runs" / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/top1")] == [3, 6, 9]
    tags = {"train/loss", "val/loss", "running/top1", "learning/rate", "norm/dead_share", "norm_dead/conv1.bn"}
    assert tags <= set(events.Tags()["scalars"])
