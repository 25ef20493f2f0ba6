"""The verbs for networks that behave in training and not in evaluation: doctor, recalibrate and freeze."""

from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from bnlab.cli.app import app
from bnlab.cli.console import ScreenProgress, show_result
from bnlab.cli.parameters import Json, takes
from bnlab.errors import plural, printable, quoted
from bnlab.options import DoctorOptions, FreezeOptions, RecalibrateOptions

_STYLES = {"error": "bold red", "warn": "bold yellow", "info": "bold cyan"}


@app.command()
@takes(DoctorOptions, optional=("model", "data"))
def doctor(
    *,
    explain: Annotated[
        str | None, typer.Option(metavar="CHECK", help="Show the page of a check, such as BN102, and do nothing else.")
    ] = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks, and do nothing else.")] = False,
    as_json: Json = False,
    **given: Any,
) -> None:
    """Find faults of batch normalisation, with their cost in accuracy, their cause and the remedy.

    For a network that is good in training and bad in evaluation: a classifier file, or any PyTorch network. The photos
    are run by running, by batch and by recalibrated statistics; checks read what was measured, and the repairs that
    they name are tested on the same photos. Nothing is changed, and with --fix a repaired copy
    is written; diagnosis.json and report.html go to runs/NAME.
    """
    if explain is not None or list_checks:
        _show_checks(explain, as_json=as_json)
        return
    for name, value in (("MODEL", given["model"]), ("--data", given["data"])):
        if value is None:
            raise typer.BadParameter(
                f"{name} is missing: pass a classifier file, and --data with photos to diagnose on"
            )
    from bnlab.commands import doctor as command

    result = command.run(DoctorOptions(**{k: v for k, v in given.items() if v is not None}), ScreenProgress())
    failing = result.failing()
    last = f"{printable(str(result.folder))}: report.html shows it."
    if result.report.findings:
        last += f" Next: bnlab doctor --explain {result.report.findings[0].id}"
    shown = _diagnosis(result.report, selected=bool(result.options.select))
    if result.repaired is not None:
        shown = Group(shown, "", _lines(str(result.repaired)))
        if result.repaired.kept:
            last = f"{printable(str(result.options.fix))}: the repaired weights. {last}"
    show_result(as_json, result.to_json(), shown, last)
    if failing:
        raise typer.Exit(1)


@app.command()
@takes(RecalibrateOptions)
def recalibrate(*, as_json: Json = False, **given: Any) -> None:
    """Measure the statistics of batch normalisation anew on training photos, and write a new file.

    For a classifier file, or any PyTorch network with its weights. The weights stay as they are. Accuracy before and
    after is measured on the same photos: those of test or val, where FOLDER has splits.
    """
    from bnlab.commands import recalibrate as command

    result = command.run(RecalibrateOptions(**given), ScreenProgress())
    lines = (
        f"{result.model}: statistics measured on {plural(result.measured, 'photo')} of {result.measured_split}\n"
        f"{result.repaired}"
    )
    output = result.options.output
    show_result(as_json, result.to_json(), _lines(lines), f"{printable(output)}: written.")


@app.command()
@takes(FreezeOptions)
def freeze(*, as_json: Json = False, **given: Any) -> None:
    """Write a classifier whose batch normalisation stays as it is in further training.

    Its statistics, gamma and beta are kept by `bnlab train --init FILE` (freeze_bn=true, unless it is set), and by
    `Classifier.load(FILE).network` in a training loop of your own. Predictions stay the same.
    """
    from bnlab.commands import freeze as command

    result = command.run(FreezeOptions(**given), ScreenProgress())
    lines = [f"{result.classifier}: {plural(len(result.layers), 'layer')} frozen"]
    lines += [f"{name} is not frozen: {reason}" for name, reason in result.kept.items()]
    lines += [] if result.repaired is None else [str(result.repaired)]
    output = result.options.output
    last = f"{printable(output)}: written. Next: bnlab train DATA --init {quoted(output)}"
    show_result(as_json, result.to_json(), _lines("\n".join(lines)), last)


def _lines(text: str) -> Text:
    return Text("\n".join(map(printable, text.splitlines())))


def _show_checks(explain: str | None, *, as_json: bool) -> None:
    from bnlab.health.registry import all_checks, find_check

    if explain is not None:
        entry = find_check(explain)
        about = vars(entry.check) | {"title": entry.title, "sections": entry.sections}
        show_result(as_json, about, entry.page().strip(), "")
        return
    rows = [
        {"id": e.check.id, "name": e.check.name, "severity": e.check.severity, "stage": e.check.stage, "title": e.title}
        for e in all_checks()
    ]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for column in ("id", "name", "severity", "finds"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["id"], row["name"], Text(row["severity"], style=_STYLES[row["severity"]]), row["title"])
    show_result(as_json, rows, table, "Read about one: bnlab doctor --explain BN102")


def _diagnosis(report: Any, *, selected: bool) -> RenderableType:
    """Accuracy by statistics, the findings and what was not checked."""
    parts: list[RenderableType] = []
    shown = "{:.1%}" if report.is_accuracy else "{:.4g}"
    values = [f"{name} {shown.format(value)}" for name, value in report.accuracy.items() if value is not None]
    if values:
        parts.append(Text(f"accuracy by statistics on {report.images} images: {', '.join(values)}"))
    for finding in report.findings:
        head = Text.assemble((finding.severity, _STYLES[finding.severity]), f"  {finding.id} {finding.name}")
        rows = [("found", finding.message)]
        rows += [("cost", str(finding.cost))] if finding.cost is not None else []
        rows += [("cause", finding.cause), ("remedy", f"{finding.remedy} ({finding.safety})")]
        rows += [("command", finding.command)] if finding.command else []
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column(overflow="fold")
        for name, text in rows:
            table.add_row(name, Text(printable(text)))
        parts += ["", head, Padding(table, (0, 0, 0, 2))]
    if not report.findings:
        parts += ["", Text("no new findings" if report.known else "no findings", style="bold green")]
    if report.attribution is not None:
        parts += ["", _explained(report.attribution)]
    parts += [Text(f"note: {printable(note)}", style="dim") for note in report.notes]
    if report.known:
        parts.append(Text(f"{plural(len(report.known), 'known finding')} of the baseline not shown", style="dim"))
    if report.skipped and selected:
        parts += [Text(f"{id} was not made: {why}", style="yellow") for id, why in report.skipped.items()]
    elif report.skipped:
        names = ", ".join(report.skipped)
        parts.append(
            Text(f"{plural(len(report.skipped), 'check')} not made ({names}); report.html says why", style="dim")
        )
    return Group(*parts)


def _explained(attribution: Any) -> RenderableType:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for i, column in enumerate(("what explains the gap", "check", "alone, points", "lost without it")):
        table.add_column(column, justify="right" if i > 1 else "left")
    for cause in attribution.causes:
        without = "–" if cause.without is None else f"{-100 * cause.without.gain:.1f}"
        table.add_row(cause.cause, cause.check, f"{100 * cause.alone.gain:+.1f}", without)
    table.add_row("not explained", "", f"{attribution.unexplained:.1f}", "")
    return table
