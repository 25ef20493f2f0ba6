"""The verb that measures claims."""

from typing import Annotated, Any, Literal

import typer

from bnlab.cli.app import app
from bnlab.cli.console import ScreenProgress, err, show_result
from bnlab.cli.parameters import Json, takes
from bnlab.errors import printable
from bnlab.options import StudyOptions


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
    from bnlab.cli import render
    from bnlab.commands import study as command

    options = StudyOptions(**given)
    if options.study == "list":
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
