"""`python -m bnlab`, and the program `bnlab`: runs a verb, and turns what it raises into one line and an exit status.

Exit status: 0 done; 1 a check or a training failed; 2 bad usage or input; 130 interrupted.
"""

import io
import os
import signal
import sys
import threading
import warnings

from typer.exceptions import TyperException

from bnlab.cli import app
from bnlab.cli.console import Stopped, err
from bnlab.errors import BnlabError, printable
from bnlab.machine import tune_allocator

_INTERRUPTED = 130


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; gives the exit status."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a request to stop is a Ctrl-C: it cleans up
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: PTH123, SIM115 (as `>&-` leaves it: closed)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name this terminal cannot show is no reason to fail
    tune_allocator()
    warnings.filterwarnings("ignore", module="PIL")  # of what is odd in a photo we say ourselves what matters
    try:
        status = app(arguments, standalone_mode=False, prog_name="bnlab")
        if status == _INTERRUPTED:  # Typer's own word for a KeyboardInterrupt
            return _complain("interrupted; every file is whole, as it was or as it should be", _INTERRUPTED)
        return status if isinstance(status, int) else 0
    except TyperException as error:
        text = error.format_message().strip().rstrip(".")
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text)  # noqa: T201
            return 2
        text = text.replace("Value error, ", "")
        return _complain(f"{text}: see `{_command_path(error)} --help`", 2)
    except BnlabError as error:
        return _complain(str(error), error.exit_status)
    except Stopped as stopped:
        return _complain(str(stopped), _INTERRUPTED)
    except OSError as error:
        return _complain(f"the system refused ({error}): see that the paths are there and may be written to", 2)


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run())


def _complain(text: str, status: int) -> int:
    err.print(f"bnlab: {printable(text)}", markup=False, soft_wrap=True)
    return status


def _command_path(error: TyperException) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "bnlab"


if __name__ == "__main__":
    main()
