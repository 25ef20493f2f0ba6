"""The verb that measures claims."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from bnlab.cli.app import app
from bnlab.cli.console import err, run_command, show_result
from bnlab.cli.options import Device, Json
from bnlab.errors import printable


class Budget(StrEnum):
    """How much a study may cost."""

    quick = "quick"
    full = "full"


class Expected(StrEnum):
    """The verdicts there are."""

    holds = "holds"
    does_not_hold = "does not hold"
    not_shown = "not shown"


@app.command("study")
def study_verb(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="A study's name; list: which there are; all.")],
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="MNIST's IDX files, a split folder, a split.csv or a folder of classes; scikit-learn's digits unless "
            "given.",
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many; the verdict is by the interval over them.", min=1, max=100)] = 3,
    budget: Annotated[
        Budget, typer.Option(help="quick: about 3 minutes a study on two cores; full: the paper's scale.")
    ] = Budget.quick,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="How much and on what, for every training, such as size, width, steps or epochs (docs/studies.md has "
            "all keys); may be repeated.",
        ),
    ] = None,
    expect: Annotated[
        Expected | None,
        typer.Option(metavar="VERDICT", help="holds, 'does not hold' or 'not shown': exit with 1 on another verdict."),
    ] = None,
    processes: Annotated[
        int,
        typer.Option(
            help="Trainings at a time on a CPU, each on one core; -1: one for each core; 0: in this process.", min=-1
        ),
    ] = -1,
    name: Annotated[
        str | None, typer.Option(help="Of the folder in runs/; unless given study-STUDY, study-STUDY2 ...")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a claim about batch normalisation: does it hold here?

    The verdict follows from numbers by a rule that its page states: holds, does not hold, or not shown by this budget.
    Measurements are kept in runs/measured, so an interrupted study goes on, and a second look costs nothing.
    """
    from bnlab.cli import render
    from bnlab.commands import study as command
    from bnlab.config import parse_assignments

    if study == "list":
        show_result(as_json, command.listing(), render.study_list(), "Measure one: bnlab study NAME")
        return
    options: dict[str, Any] = parse_assignments(settings or [])
    asked = command.StudySettings(
        study=study,
        data=data,
        seeds=seeds,
        budget=budget.value,
        device=device,
        processes=processes,
        options=options,
        name=name,
    )
    result = run_command(command.run, asked)
    show_result(as_json, result.to_json(), render.study_table(result), f"{printable(result.page)} shows it.")
    others = [r for r in result.reports if expect is not None and r.findings.verdict != expect.value]
    if others:
        said = ", ".join(f"{report.study.name}: {report.findings.verdict}" for report in others)
        err.print(f"bnlab: {expect} was expected; {said}", markup=False, soft_wrap=True)
        raise typer.Exit(1)
