"""Writes a study's results: its page, its tables as CSV, its plots as PNG, and one JSON document."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bnlab.files import write_atomic, write_csv, write_json
from bnlab.lab.experiment import Experiment
from bnlab.lab.records import Records, Results, Row
from bnlab.lab.study import Conclusion, Study
from bnlab.report.page import render
from bnlab.report.plots import Plot, plot_png, plot_svg

PAGE = "report.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """A study that was measured, and the folder of its page."""

    study: Study
    experiment: Experiment
    results: Results
    folder: Path = Path()

    def __repr__(self) -> str:
        return f"<Report {self.study.name}: {self.conclusion.verdict}, {self.folder}>"

    @cached_property
    def conclusion(self) -> Conclusion:
        return self.study.conclude(self.results).with_overlap(self.experiment.splits.overlap)

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab study NAME --json`."""
        return {
            "study": self.study.name,
            "claim": self.study.claim,
            "source": self.study.source,
            "verdict": str(self.conclusion.verdict),
            "numbers": self.conclusion.to_json(),
            "remarks": list(self.conclusion.remarks),
            "budget": self.experiment.budget,
            "data": self.experiment.splits.name,
            "options": dict(self.experiment.options),
            "seeds": len(self.experiment.seeds),
            "seconds": self.experiment.seconds,
            "report": str(self.folder / PAGE),
        }


def write_report(report: Report, folder: Path, environment: Mapping[str, Any], *, index: str | None = None) -> Report:
    """Write all files into an existing folder. `index` is the page that links to this one.

    Raises:
        StorageError: no space left.
    """
    report = replace(report, folder=folder)
    conclusion = report.conclusion
    for name, rows in report.results.items():
        _write_table(folder / f"{name}.csv", rows)
    plots = {name.replace(" ", "-"): plot for name, plot in conclusion.plots.items()}
    for name, plot in plots.items():
        assert plot.table in report.results, f"the table {plot.table} of {name} is missing"
        write_atomic(folder / f"{name}.png", plot_png(plot))
        _write_table(folder / f"{name}-drawn.csv", _points_of(plot))
    write_json(folder / "study.json", report.to_json() | {"environment": dict(environment)})
    page = render(
        "study.html",
        title=f"{report.study.title}: {conclusion.verdict}",
        report=report,
        plots=[(name, plot, plot_svg(plot)) for name, plot in plots.items()],
        options=", ".join(f"{key} {value}" for key, value in report.experiment.options.items()),
        index=index,
        environment=environment,
    )
    write_atomic(folder / PAGE, page)
    return report


def write_index(reports: Sequence[Report], folder: Path, environment: Mapping[str, Any]) -> None:
    """Write the page that links to those of all studies."""
    page = render(
        "studies.html",
        title="bnlab: claims measured",
        reports=reports,
        page=PAGE,
        experiment=reports[0].experiment,
        environment=environment,
    )
    write_atomic(folder / PAGE, page)


def _points_of(plot: Plot) -> Records:
    """A row for each point that a plot shows."""
    rows: Records = []
    for series in plot.series:
        for i, (x, y) in enumerate(zip(series.x, series.y, strict=True)):
            at = plot.categories[round(x)] if plot.categories else x
            row: Row = {"series": series.name, plot.x or "of": at, "y": y}
            rows.append(row | ({"low": series.low[i], "high": series.high[i]} if series.low else {}))
    return rows


def _write_table(path: Path, rows: Records) -> None:
    """Write rows as CSV, with each column that one of them has. Floats have nine digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = ([row.get(column) for column in columns] for row in rows)
    write_csv(path, columns, ([f"{v:.9g}" if isinstance(v, float) else v for v in values] for values in cells))
