"""The verb that looks at the machine."""

from bnlab.cli.app import app
from bnlab.cli.console import run_command, show_result
from bnlab.cli.options import Device, Json


@app.command("machine")
def machine_verb(device: Device = "auto", as_json: Json = False) -> None:
    """Show what this machine is, how bnlab uses it, and how fast it multiplies matrices."""
    from bnlab.cli.render import machine_table
    from bnlab.commands import machine

    result = run_command(machine.run, machine.MachineSettings(device=device))
    show_result(as_json, result.to_json(), machine_table(result), "")
