"""The verb that describes the machine."""

from typing import Any

from bnlab.cli.app import app
from bnlab.cli.console import ScreenProgress, show_result
from bnlab.cli.parameters import Json, takes
from bnlab.options import MachineOptions


@app.command()
@takes(MachineOptions)
def machine(*, as_json: Json = False, **given: Any) -> None:
    """Show what this machine is, how bnlab uses it, and how fast it multiplies matrices."""
    from bnlab.cli.render import machine_table
    from bnlab.commands import machine as command

    result = command.run(MachineOptions(**given), ScreenProgress())
    show_result(as_json, result.to_json(), machine_table(result), "")
