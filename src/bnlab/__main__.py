"""`python -m bnlab`, and the program `bnlab`: runs a verb, and turns each error into one line and an exit status.

Exit status: 0 done; 1 a training diverged, or a study's verdict is not the expected one; 2 bad usage or input; 130
interrupted.
"""

import io
import os
import signal
import sys
import threading
import time
import warnings

import typer
from typer.exceptions import TyperException

import bnlab
from bnlab.cli import app
from bnlab.cli.console import err, only_the_screen
from bnlab.errors import BnlabError, printable
from bnlab.machine import tune_allocator


def main(arguments: list[str] | None = None) -> int:
    began = bnlab._imported if arguments is None else time.monotonic()  # from which a training's time counts
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to stop saves and cleans up, as Ctrl-C
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115 (None if the shell closed it with `>&-`)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal's encoding does not have
    tune_allocator()
    warnings.filterwarnings("ignore", module="PIL")  # bnlab itself warns of photos that it cannot use
    try:
        # Typer's own main() would turn Interrupted into a bare status and lose its message.
        words = sys.argv[1:] if arguments is None else arguments
        with only_the_screen(), typer.main.get_command(app).make_context("bnlab", words, obj=began) as context:
            context.command.invoke(context)
        return 0
    except typer.Exit as stop:
        return stop.exit_code
    except TyperException as error:
        verb = getattr(error, "ctx", None)
        text = (
            error.format_message().strip().rstrip(".").replace("Value error, ", "").replace("Input should", "it must")
        )
        return _complain(f"{text}: see `{verb.command_path if verb else 'bnlab'} --help`", 2)
    except BnlabError as error:
        return _complain(str(error), error.exit_status)
    except KeyboardInterrupt as interruption:  # Interrupted has a message, Python's own has none
        return _complain(str(interruption) or "interrupted; every file is complete, either the old or the new one", 130)
    except MemoryError:
        return _complain("out of memory: close what else takes memory, or work on smaller photos or fewer at a time", 2)
    except OSError as error:
        return _complain(f"the system refused ({error}): check that the paths exist and may be written to", 2)


def _complain(text: str, status: int) -> int:
    err.print(f"bnlab: {printable(text)}", markup=False, soft_wrap=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
