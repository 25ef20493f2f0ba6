"""`bnlab study`: measure a claim about batch normalisation, and say whether it holds."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from bnlab.errors import UsageError
from bnlab.files import read_json
from bnlab.lab.experiment import Experiment, check_options
from bnlab.lab.measurements import exclusive
from bnlab.lab.report import PAGE, Report, judged, write_index, write_report
from bnlab.lab.splits import StudySplits, open_study_splits
from bnlab.lab.study import STUDY_NAMES, Study, find_study
from bnlab.machine import choose_device, environment, usable_cores
from bnlab.progress import Progress
from bnlab.runs import RUNS, check_free, new_run

ALL = "all"
MEASURED = "measured"  # the folder in runs where measurements are kept
MOST_SEEDS = 100


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What `bnlab study` is told."""

    study: str
    """a name of the catalogue, or "all" """
    data: Path | None = None
    """IDX files, a split folder, a split.csv or a folder of classes; scikit-learn's digits unless given"""
    seeds: int = 3
    """how many: 0, 1, ..."""
    budget: Literal["quick", "full"] = "quick"
    device: str = "auto"
    processes: int = -1
    """trainings at a time, on a CPU; -1: as many as there are cores; 0: in this process"""
    options: Mapping[str, Any] = field(default_factory=dict)
    """recipe keys for every training"""
    name: str | None = None
    """of the folder in runs; study-NAME unless given"""
    root: Path = RUNS


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The studies that were measured, and the folder with their pages."""

    reports: tuple[Report, ...]
    folder: Path
    is_all: bool

    @property
    def page(self) -> Path:
        """What to look at."""
        return self.folder / PAGE

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab study --json`."""
        if not self.is_all:
            return self.reports[0].to_json()
        return {"studies": [report.to_json() for report in self.reports], "report": str(self.page)}


def listing() -> list[dict[str, str]]:
    """The document of `bnlab study list --json`."""
    return [
        {"study": study.name} | {key: getattr(study, key) for key in ("title", "claim", "source", "protocol", "rule")}
        for study in map(find_study, STUDY_NAMES)
    ]


def run(settings: StudySettings, progress: Progress) -> StudyResult:
    """Measure one study, or all; what was measured before is taken from where it was kept.

    Raises:
        BnlabError: there is no such study, DATA is nothing to study, a setting cannot be, the disk or memory is full.
        Interrupted: Ctrl-C; what is done is kept.
    """
    names = STUDY_NAMES if settings.study == ALL else (settings.study,)
    studies = [find_study(name) for name in names]
    if not 1 <= settings.seeds <= MOST_SEEDS:
        raise UsageError(f"seeds {settings.seeds} cannot be", f"give 1 to {MOST_SEEDS}; 3 is the least that says much")
    if settings.name == MEASURED:
        raise UsageError(f"{MEASURED} is where measurements are kept", "take another --name")
    if settings.seeds == 1:
        progress.warn("one seed gives no interval, so what is measured over seeds will be not shown")
    for study in studies:
        check_options(study.name, settings.options, study.own_keys)
    check_free(settings.root, settings.name)
    device = choose_device(settings.device)
    about = {"date": datetime.now(UTC).date().isoformat(), **environment(device)}
    with exclusive(settings.root / MEASURED):
        splits = open_study_splits(
            settings.data,
            quick=settings.budget == "quick",
            min_photos=max(study.min_photos for study in studies),
            folder=settings.root / MEASURED / "photos",
            progress=progress,
        )
        if settings.study == ALL:
            return _all(studies, settings, splits, device, about, progress)
        experiment = _bench(studies[0], settings, splits, device, progress)
        results = studies[0].measure(experiment)
    report = judged(studies[0], experiment, results)
    folder = _seen(report, settings) or new_run(settings.root, settings.name, stem=f"study-{settings.study}").folder
    return StudyResult(reports=(write_report(report, experiment, results, folder, about),), folder=folder, is_all=False)


def _all(
    studies: Sequence[Study],
    settings: StudySettings,
    splits: StudySplits,
    device: str,
    about: dict[str, Any],
    progress: Progress,
) -> StudyResult:
    """One after the other; what is done has its page, and is in the index, before the next is measured."""
    folder: Path | None = None
    reports: list[Report] = []
    for study in studies:
        experiment = _bench(study, settings, splits, device, progress)
        results = study.measure(experiment)
        folder = folder or new_run(settings.root, settings.name, stem=f"study-{ALL}").folder
        (folder / study.name).mkdir()
        report = judged(study, experiment, results)
        reports.append(write_report(report, experiment, results, folder / study.name, about, index=f"../{PAGE}"))
        progress.note(f"{study.name}: {report.findings.verdict} ({len(reports)} of {len(studies)}; {folder / PAGE})")
        write_index(
            reports,
            folder,
            data=splits.name,
            seeds=settings.seeds,
            budget=settings.budget,
            date=about["date"],
            environment=about,
        )
    assert folder is not None
    return StudyResult(reports=tuple(reports), folder=folder, is_all=True)


def _seen(report: Report, settings: StudySettings) -> Path | None:
    """The folder of an earlier look that saw the same, unless a name is given: another look needs no other folder."""
    if settings.name is not None:
        return None
    changes = ("report", "seconds", "environment")
    mine = {key: value for key, value in json.loads(json.dumps(report.to_json())).items() if key not in changes}
    for path in sorted(settings.root.glob(f"study-{settings.study}*/study.json")):
        if {key: value for key, value in read_json(path).items() if key not in changes} == mine:
            return path.parent
    return None


def _bench(study: Study, settings: StudySettings, splits: StudySplits, device: str, progress: Progress) -> Experiment:
    return Experiment(
        name=study.name,
        splits=splits,
        budget=settings.budget,
        seeds=tuple(range(settings.seeds)),
        device=device,
        processes=usable_cores() if settings.processes < 0 else settings.processes,
        folder=settings.root / MEASURED,
        progress=progress,
        options=settings.options,
    )
