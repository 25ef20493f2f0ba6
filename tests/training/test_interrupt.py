import os
import signal
import threading

import pytest

from bnlab.training.interrupt import listening


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_request_is_noted_and_the_second_obeyed(number: int) -> None:
    before = signal.getsignal(number)
    with listening() as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        assert stop.asked
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_off_the_main_thread_it_is_quiet() -> None:
    asked: list[bool] = []

    def work() -> None:
        with listening() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
