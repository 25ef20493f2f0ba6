"""The verbs that measure and convert: machine, net, import (weights from elsewhere) and study."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

import typer

from bnlab.cli import render
from bnlab.cli.app import app
from bnlab.cli.console import ScreenProgress, err, show_result
from bnlab.cli.parameters import Json, takes
from bnlab.errors import printable, quoted
from bnlab.options import ImportOptions, MachineOptions, NetOptions, StudyOptions


@app.command()
@takes(MachineOptions)
def machine(*, as_json: Json = False, **given: Any) -> None:
    """Show what this machine is, how bnlab uses it, and how fast it multiplies matrices."""
    from bnlab.commands import machine as command

    document = command.run(MachineOptions(**given), ScreenProgress())
    show_result(as_json, document, render.machine_table(document), "")


@app.command()
@takes(NetOptions)
def net(
    *,
    by_part: Annotated[bool, typer.Option("--all", help="Show each part of each layer (--json always does).")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """List the networks, or count the parameters and multiply-adds of one, layer by layer."""
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
    show_result(as_json, asdict(result), table, render.counting_note(result, auxiliary=options.auxiliary))


@app.command("import")
@takes(ImportOptions)
def import_(*, as_json: Json = False, **given: Any) -> None:
    """Turn weights from elsewhere into a classifier file.

    It recognises torchvision's googlenet, files of the GoogLeNet tutorial, BN-Inception with Caffe's names (Cadene,
    TSN) and bnlab's own networks. Code in FILE is never run; tensors that do not match are named.
    """
    from bnlab.commands import import_weights as command

    options = ImportOptions(**given)
    result = command.run(options, ScreenProgress())
    last = f"{printable(options.output)}: written. Next: bnlab evaluate {quoted(options.output)} DATA"
    show_result(as_json, result.to_json(), render.import_lines(result), last)


@app.command()
@takes(StudyOptions)
def study(
    *,
    expect: Annotated[
        Literal["holds", "does not hold", "not shown"] | None,
        typer.Option(
            metavar="VERDICT",
            help="Expected verdict: holds, 'does not hold' or 'not shown'. Any other verdict makes the exit status 1.",
        ),
    ] = None,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Measure whether a claim about batch normalisation holds here.

    The verdict follows from the measurements by a rule that its page states: holds, does not hold, or not shown by this
    budget. Measurements are kept in runs/measured, so an interrupted study continues and a repeated one costs nothing.
    """
    from bnlab.commands import study as command

    options = StudyOptions(**given)
    if options.study == "list":
        if expect is not None or options != StudyOptions(study="list"):
            raise typer.BadParameter("with list, only --json has an effect: pass the name of a study")
        studies = command.listing()
        show_result(as_json, studies, render.study_list(studies), "Measure one: bnlab study NAME")
        return
    result = command.run(options, ScreenProgress())
    show_result(as_json, result.to_json(), render.study_table(result), f"{printable(result.page)} shows it.")
    verdicts = {report.study.name: str(report.conclusion.verdict) for report in result.reports}
    if expect is not None and set(verdicts.values()) != {expect}:
        others = ", ".join(f"{name}: {verdict}" for name, verdict in verdicts.items() if verdict != expect)
        err.print(f"bnlab: the verdict {expect} was expected, but {others}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
