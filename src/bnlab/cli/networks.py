"""The verbs about networks: net (their size) and import (weights from elsewhere)."""

from typing import Annotated, Any

import typer

from bnlab.cli.app import app
from bnlab.cli.console import ScreenProgress, show_result
from bnlab.cli.parameters import Json, takes
from bnlab.errors import printable, quoted
from bnlab.options import ImportOptions, NetOptions


@app.command()
@takes(NetOptions)
def net(
    *,
    by_part: Annotated[bool, typer.Option("--all", help="Show each part of each layer (--json always does).")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """List the networks, or count the parameters and multiply-adds of one, layer by layer."""
    from bnlab.cli import render
    from bnlab.commands import net as command

    options = NetOptions(**given)
    if options.name is None:
        if by_part or options != NetOptions():
            raise typer.BadParameter("without NAME, only --json has an effect: pass the name of a network")
        networks = command.listing()
        show_result(as_json, networks, render.network_list(networks), "Count one: bnlab net NAME")
        return
    result = command.run(options, ScreenProgress())
    table = render.network_table(result, by_part=by_part)
    show_result(as_json, result.to_json(), table, render.counting_note(result))


@app.command("import")
@takes(ImportOptions)
def import_(*, as_json: Json = False, **given: Any) -> None:
    """Turn weights from elsewhere into a classifier file.

    It recognises torchvision's googlenet, files of the GoogLeNet tutorial, BN-Inception with Caffe's names (Cadene,
    TSN) and bnlab's own networks. Code in FILE is never run; tensors that do not match are named.
    """
    from bnlab.cli.render import import_lines
    from bnlab.commands import import_weights as command

    options = ImportOptions(**given)
    result = command.run(options, ScreenProgress())
    last = f"{printable(options.output)}: written. Next: bnlab evaluate {quoted(options.output)} DATA"
    show_result(as_json, result.to_json(), import_lines(result), last)
