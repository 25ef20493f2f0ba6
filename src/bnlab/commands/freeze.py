"""`bnlab freeze`: write a classifier file whose normalisation layers stay as they are when it is trained further."""

from dataclasses import dataclass, replace
from typing import Any

from bnlab.classifier.file import check_new_file
from bnlab.classifier.opened import check_classes, open_classifier, photo_batches, save_model
from bnlab.data.dataset import open_evaluation_data
from bnlab.data.scan import Refusal, Result, report_refused
from bnlab.errors import UsageError, printable
from bnlab.health import Repaired, repair, repairs
from bnlab.machine import choose_device, memory_errors
from bnlab.norm import freeze
from bnlab.options import FreezeOptions
from bnlab.progress import LoggedProgress, Progress


@dataclass(frozen=True, kw_only=True)
class FreezeResult(Result):
    options: FreezeOptions
    classifier: str
    layers: tuple[str, ...]
    """those that are frozen"""
    kept: dict[str, str]
    """normalisation layers that are not, each with the reason"""
    repaired: Repaired | None
    """accuracy before and after, if photos were given"""
    split: str | None

    def to_json(self) -> dict[str, Any]:
        comparison = self.repaired and self.repaired.comparison
        return {
            "classifier": self.classifier,
            "output": str(self.options.output),
            "layers": list(self.layers),
            "kept": self.kept,
            "accuracy": comparison and {"split": self.split, **comparison.to_json()},
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.refused],
        }


def run(options: FreezeOptions, progress: Progress) -> FreezeResult:
    """Freeze the normalisation layers, measure accuracy if photos are given, and write the classifier file."""
    progress = LoggedProgress(progress)
    check_new_file(options.output, "output")
    model = open_classifier(options.classifier)
    assert model.card is not None
    assert model.classes is not None
    split, repaired = None, None
    refused: list[Refusal] = []
    if options.data is not None:
        split, photos = open_evaluation_data(options.data, None, refused, progress)
        check_classes(options.data, photos, model.classes, model)
        batches = photo_batches(model, photos, model.classes, options)
        model.network.to(choose_device(options.device)).eval()
        with memory_errors(options.batch_size, model.preprocessing.size):
            repaired = repair(model.network, batches, [repairs.freeze()])
        refused = [*refused, *batches.refused]
        report_refused(refused, strict=options.strict, progress=progress)
    done = freeze(model.network)
    if not done.frozen:
        why = "; ".join(dict.fromkeys(done.kept.values())) or "it has none"
        raise UsageError(
            f"{printable(options.classifier)} has no normalisation layer to freeze ({why})",
            "pass a classifier with batch normalisation",
        )
    if model.card.frozen_norms:
        progress.warn(f"the normalisation layers of {printable(options.classifier)} are frozen already")
    save_model(options.output, model, model.network, replace(model.card, frozen_norms=True))
    return FreezeResult(
        options=options,
        classifier=model.name,
        layers=done.frozen,
        kept=done.kept,
        repaired=repaired,
        split=split,
        warnings=tuple(progress.warnings),
        refused=tuple(refused),
    )
