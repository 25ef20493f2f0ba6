"""`bnlab study`: measure whether a claim about batch normalisation holds."""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bnlab.config import load_settings
from bnlab.data.photo_file import PhotoReader
from bnlab.data.scan import Result
from bnlab.errors import UsageError
from bnlab.files import read_json
from bnlab.lab.experiment import Experiment, check_options
from bnlab.lab.measurements import exclusive
from bnlab.lab.report import PAGE, Report, write_index, write_report
from bnlab.lab.splits import open_study_splits
from bnlab.lab.study import STUDY_NAMES, find_study
from bnlab.machine import choose_device, environment, usable_cores
from bnlab.options import StudyOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.runs import check_free, new_run

ALL = "all"
MEASURED = "measured"  # the folder in runs where measurements are kept


@dataclass(frozen=True, kw_only=True)
class StudyResult(Result):
    reports: tuple[Report, ...]
    folder: Path
    is_all: bool

    @property
    def page(self) -> Path:
        return self.folder / PAGE

    def __repr__(self) -> str:
        verdicts = Counter(str(report.conclusion.verdict) for report in self.reports)
        alone = [f"{report.study.name}: {report.conclusion.verdict}" for report in self.reports]
        found = [f"{verdict}: {number}" for verdict, number in verdicts.items()] if self.is_all else alone
        return self._line(*found, f"{self.folder}")

    def to_json(self) -> dict[str, Any]:
        if not self.is_all:
            return self.reports[0].to_json()
        return {"studies": [report.to_json() for report in self.reports], "report": str(self.page)}


def listing() -> list[dict[str, str]]:
    """The document of `bnlab study list --json`."""
    return [
        {"study": study.name} | {key: getattr(study, key) for key in ("title", "claim", "source", "protocol", "rule")}
        for study in map(find_study, STUDY_NAMES)
    ]


def run(options: StudyOptions, progress: Progress) -> StudyResult:
    """Measure one study, or all; measurements that exist already are not repeated."""
    progress = LoggedProgress(progress)
    is_all = options.study == ALL
    studies = [find_study(name) for name in (STUDY_NAMES if is_all else (options.study,))]
    if options.name == MEASURED:
        raise UsageError(f"the folder {MEASURED} is for measurements", "pass another name")
    if options.seeds == 1:
        progress.warn("one seed gives no interval, so clauses over seeds get the verdict not shown: pass seeds=3")
    for study in studies:
        check_options(study.name, options.recipe_keys, study.own_keys)
    settings = load_settings("default", options.recipe_keys)
    for sentence in settings.without_effect():
        progress.warn(sentence)
    check_free(options.runs, options.name)
    device = choose_device(options.device)
    if device != "cpu" and options.processes > 0:
        progress.warn(f"processes has no effect: it is for a CPU, and this study runs on {device}")
    about = {"date": datetime.now(UTC).date().isoformat(), **environment(device)}
    folder, stem = None, f"study-{options.study}"
    reports: list[Report] = []
    with exclusive(options.runs / MEASURED):
        splits = open_study_splits(
            options.data,
            quick=options.budget == "quick",
            min_photos=max(study.min_photos for study in studies),
            folder=options.runs / MEASURED / "photos",
            progress=progress,
            reader=PhotoReader(settings.recipe.pixel_range, settings.recipe.max_megapixels),
        )
        for study in studies:
            experiment = Experiment(
                name=study.name,
                splits=splits,
                budget=options.budget,
                seeds=tuple(range(options.seeds)),
                device=device,
                processes=usable_cores() if options.processes < 0 else options.processes,
                folder=options.runs / MEASURED,
                progress=progress,
                options=options.recipe_keys,
            )
            report = Report(study=study, experiment=experiment, results=study.measure(experiment))
            if is_all:
                folder = folder or new_run(options.runs, options.name, stem).folder
                (folder / study.name).mkdir()
                reports.append(write_report(report, folder / study.name, about, index=f"../{PAGE}"))
                done = f"{len(reports)} of {len(studies)}; {folder / PAGE}"
                progress.note(f"{study.name}: {report.conclusion.verdict} ({done})")
                write_index(reports, folder, about)  # already now, in case the next study is interrupted
            else:
                folder = _same_as_before(report, options) or new_run(options.runs, options.name, stem).folder
                reports.append(write_report(report, folder, about))
    assert folder is not None
    return StudyResult(
        reports=tuple(reports),
        folder=folder,
        is_all=is_all,
        warnings=tuple(progress.warnings),
        refused=tuple(splits.refused),
    )


def _same_as_before(report: Report, options: StudyOptions) -> Path | None:
    """The folder of an earlier study with the same results, unless `name` asks for a new one."""
    if options.name is not None:
        return None
    changes = ("report", "seconds", "environment")
    mine = {key: value for key, value in json.loads(json.dumps(report.to_json())).items() if key not in changes}
    for path in sorted(options.runs.glob(f"study-{options.study}*/study.json")):
        if {key: value for key, value in read_json(path).items() if key not in changes} == mine:
            return path.parent
    return None
