"""A study's results on paper: its page, its tables as CSV, its plots as PNG, and one JSON document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bnlab.files import write_atomic, write_csv, write_json
from bnlab.lab.experiment import Experiment
from bnlab.lab.records import Records, Results, Row
from bnlab.lab.study import Conclusion, Study
from bnlab.report.html import render
from bnlab.report.plots import Plot, plot_png, plot_svg

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One study that was measured, and where its page is."""

    study: Study
    findings: Conclusion
    folder: Path
    budget: str
    data: str
    options: Mapping[str, Any]
    """recipe keys that the user set"""
    seeds: int
    seconds: float
    """of computing, over all measurements, whenever they were made"""

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab study NAME --json`."""
        return {
            "study": self.study.name,
            "claim": self.study.claim,
            "source": self.study.source,
            "verdict": str(self.findings.verdict),
            "numbers": self.findings.to_json(),
            "remarks": list(self.findings.remarks),
            "budget": self.budget,
            "data": self.data,
            "options": dict(self.options),
            "seeds": self.seeds,
            "seconds": self.seconds,
            "report": str(self.folder / PAGE),
        }


def judged(study: Study, experiment: Experiment, results: Results) -> Report:
    """What the tables say, before it is written."""
    return Report(
        study=study,
        findings=study.conclude(results).with_overlap(experiment.splits.overlap),
        folder=Path(),
        budget=experiment.budget,
        data=experiment.splits.name,
        options=experiment.options,
        seeds=len(experiment.seeds),
        seconds=experiment.seconds,
    )


def write_report(
    report: Report,
    experiment: Experiment,
    results: Results,
    folder: Path,
    environment: Mapping[str, Any],
    *,
    index: str | None = None,
) -> Report:
    """Write all files into a folder that is there; `index` is the page that leads here.

    Raises:
        StorageError: no space left.
    """
    report = replace(report, folder=folder)
    study, findings = report.study, report.findings
    for name, rows in results.items():
        write_table(folder / f"{name}.csv", rows)
    plots = {name.replace(" ", "-"): plot for name, plot in findings.plots.items()}
    for name, plot in plots.items():
        assert plot.table in results, f"{name} is of no table"
        write_atomic(folder / f"{name}.png", plot_png(plot))
        write_table(folder / f"{name}-drawn.csv", drawn(plot))
    write_json(folder / "study.json", report.to_json() | {"environment": dict(environment)})
    page = render(
        "study.html",
        title=f"{study.title}: {findings.verdict}",
        study=study,
        verdict=str(findings.verdict),
        evidence=findings.evidence,
        remarks=findings.remarks,
        numbers=findings.numbers,
        plots=[(name, plot, plot_svg(plot)) for name, plot in plots.items()],
        results=list(results),
        seeds=len(experiment.seeds),
        data=experiment.splits.name,
        photos=len(experiment.splits),
        found=experiment.splits.found,
        recalibration_images=experiment.recalibration_images,
        classes=experiment.splits.classes,
        is_drawn=experiment.splits.is_drawn,
        budget=experiment.budget,
        minutes=f"{experiment.seconds / 60:.1f}",
        options=", ".join(f"{key} {value}" for key, value in experiment.options.items()),
        index=index,
        environment=environment,
    )
    write_atomic(folder / PAGE, page)
    return report


def write_index(reports: Sequence[Report], folder: Path, **about: Any) -> None:
    """The page that leads to those of all studies."""
    rows = [(report.study, str(report.findings.verdict), f"{report.study.name}/{PAGE}") for report in reports]
    write_atomic(
        folder / PAGE,
        render("studies.html", title="bnlab: claims measured", studies=rows, **about),
    )


def drawn(plot: Plot) -> Records:
    """The numbers that a plot shows, point by point."""
    rows: Records = []
    for series in plot.series:
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            job = plot.categories[round(x)] if plot.categories else x
            row: Row = {"series": series.name, plot.x or "of": job, "y": y}
            rows.append(row | ({"low": series.low[i], "high": series.high[i]} if series.low else {}))
    return rows


def write_table(path: Path, rows: Records) -> None:
    """The rows as CSV, with all the columns that any of them has; floats to nine digits, which is finer than any is."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    write_csv(path, columns, ([_cell(row.get(column)) for column in columns] for row in rows))


def _cell(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
