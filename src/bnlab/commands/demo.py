"""`bnlab demo`: train, evaluate and predict on handwritten digits, with and without batch normalisation."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.classifier.evaluate import Evaluation, evaluate
from bnlab.classifier.predict import Classifier, Prediction
from bnlab.config import Settings, load_settings
from bnlab.data.dataset import open_recorded_data
from bnlab.data.digits import write_digits
from bnlab.data.scan import Result
from bnlab.data.split import split_folder, write_split
from bnlab.errors import DivergedError, Interrupted
from bnlab.files import read_csv, read_json, write_atomic
from bnlab.options import DemoOptions
from bnlab.progress import LoggedProgress, Progress
from bnlab.report import figures
from bnlab.report.page import render, write_run_page
from bnlab.runs import Run, new_run
from bnlab.streams import Use, random_stream
from bnlab.training import run as training_run

NETWORKS = {"with BN": "bn_small_inception", "without BN": "small_inception"}
NUM_ANSWERS = 8  # held-out digits that are classified in the table and on the page


@dataclass(frozen=True, kw_only=True)
class Trained:
    """One of the two trainings and its outcome."""

    run: Run
    rows: list[dict[str, float | None]]  # metrics, one row an epoch
    test: Evaluation | None  # on the held-out digits; None if the training diverged in its first epoch
    diverged: str | None  # why the training diverged

    def outcome(self) -> str:
        reached = "no epoch finished"
        if self.test:
            low, high = self.test.top1_interval
            best = max(row["val_top1"] or 0.0 for row in self.rows)
            reached = f"{self.test.top1:.1%} of {self.test.n} held-out digits correct (95% interval {low:.1%} to "
            reached += f"{high:.1%}), best val accuracy {best:.1%} in {len(self.rows)} epochs"
        return f"diverged: {self.diverged}; {reached}" if self.diverged else reached

    def to_json(self) -> dict[str, Any]:
        return {
            "best": str(self.run.best),
            "test_top1": self.test.top1 if self.test else None,
            "n": self.test.n if self.test else 0,
            "diverged": self.diverged,
        }


@dataclass(frozen=True, kw_only=True)
class DemoResult(Result):
    networks: dict[str, Trained]
    answers: list[Prediction]
    report: Path

    def to_json(self) -> dict[str, Any]:
        networks = {name: trained.to_json() for name, trained in self.networks.items()}
        return {"folder": str(self.report.parent), "report": str(self.report), "twins": networks}


def run(options: DemoOptions, progress: Progress) -> DemoResult:
    """Write the digits, split them, train both networks, evaluate them, classify a few digits, and write the page."""
    progress = LoggedProgress(progress)
    recipes = {name: load_settings("digits", {"network": n, "seed": options.seed}) for name, n in NETWORKS.items()}
    folder = new_run(options.runs, None, stem="demo").folder
    write_digits(folder / "photos")
    split = split_folder(folder / "photos", val=0.1, test=0.2, seed=options.seed, progress=progress)
    write_split(split, folder / "data", "link", progress)
    held_out = [photo for photo in split.photos if photo.split == "test"]
    progress.note(f"{len(split.photos)} digits in {folder / 'photos'}, {len(held_out)} of them held out as test")

    try:
        networks = {name: _train(folder, name, recipe, progress) for name, recipe in recipes.items()}
    except Interrupted:
        raise Interrupted(f"the demo was interrupted and leaves {folder}; begin again with: bnlab demo") from None
    winner = networks["with BN"]
    if winner.test is None:
        raise DivergedError(winner.outcome(), "pass another seed")
    classifier = Classifier.load(winner.run.best)
    random = random_stream(options.seed, Use.DEMO_ANSWERS)
    answers = classifier.predict([held_out[i].path for i in random.choice(len(held_out), NUM_ANSWERS, replace=False)])
    page = render(
        "demo.html",
        title="bnlab demo",
        evaluation=winner.test,
        curves=figures.curves({name: trained.rows for name, trained in networks.items() if trained.rows}),
        outcomes={name: trained.outcome() for name, trained in networks.items()},
        answers=answers,
        recipe=winner.run.recipe.read_text("utf-8"),
        environment=read_json(winner.run.environment),
    )
    write_atomic(folder / "report.html", page)
    return DemoResult(
        networks=networks, answers=answers, report=folder / "report.html", warnings=tuple(progress.warnings)
    )


def _train(folder: Path, name: str, settings: Settings, progress: Progress) -> Trained:
    progress.note(f"training the network {name}")
    run = Run(folder / name.replace(" ", "-"))
    diverged = None
    try:
        result = training_run.train(
            folder / "data", settings, root=folder, name=run.name, strict=False, progress=progress
        )
        write_run_page(run, result.evaluation, result.rows, str(result.frozen))
    except DivergedError as error:
        diverged = error.problem
        progress.warn(diverged)
    table = read_csv(run.metrics) if run.metrics.exists() else []
    rows = [{key: float(value) if value else None for key, value in row.items()} for row in table]
    test = None
    if run.best.exists():
        test = evaluate(Classifier.load(run.best), open_recorded_data(run.split).in_split("test"), "test")
    return Trained(run=run, rows=rows, test=test, diverged=diverged)
