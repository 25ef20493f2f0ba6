"""What a diagnosis found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnlab.errors import plural
from bnlab.health.attribution import Attribution
from bnlab.health.check import SEVERITIES, Finding, Severity
from bnlab.health.evidence import Evidence


@dataclass(frozen=True, kw_only=True)
class Report:
    """The findings of a diagnosis, the worst first, and the accuracy by each kind of statistics."""

    findings: tuple[Finding, ...]
    accuracy: Mapping[str, float | None]
    """by "running", "batch" and "recalibrated" statistics: fraction of images classified correctly, or the mean of the
    caller's metric; None: not measured"""
    is_accuracy: bool = True
    """False: these are the mean of the caller's metric"""
    images: int
    skipped: Mapping[str, str]
    """the checks that could not be made, by id, with what they need"""
    notes: tuple[str, ...] = ()
    """what else the reader should know"""
    known: tuple[Finding, ...] = ()
    """findings that a baseline lists as known"""
    attribution: Attribution | None = None
    """how much of the gap between batch and running statistics each repair explains; None: there is no gap"""
    evidence: Evidence = field(repr=False)

    def at_or_above(self, severity: Severity) -> tuple[Finding, ...]:
        """The findings of this severity and worse ones."""
        worst = SEVERITIES[: SEVERITIES.index(severity) + 1]
        return tuple(finding for finding in self.findings if finding.severity in worst)

    def __getitem__(self, id: str) -> Finding:
        """The finding of a check, by its id or name.

        Raises:
            KeyError: the check found nothing.
        """
        return next((f for f in self.findings if id in (f.id, f.name)), None) or self._missing(id)

    def _missing(self, id: str) -> Finding:
        raise KeyError(id)

    def __contains__(self, id: str) -> bool:
        return any(id in (finding.id, finding.name) for finding in self.findings)

    def __repr__(self) -> str:
        found = ", ".join(f"{f.id} {f.name}" for f in self.findings) or "nothing"
        return f"<Report on {plural(self.images, 'image')}: {found}>"

    def __str__(self) -> str:
        values = {key: value for key, value in self.accuracy.items() if value is not None}
        what = "accuracy" if self.is_accuracy else "metric"
        shown = ", ".join(f"{v:.1%}" if self.is_accuracy else f"{v:.4g}" for v in values.values())
        lines = [f"{what} by {', '.join(values)} statistics: {shown}"] * bool(values)
        lines += [f"{finding.severity}: {finding}" for finding in self.findings] or ["no findings"]
        return "\n".join([*lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab doctor --json`, except for the model's name."""
        return {
            "images": self.images,
            "accuracy": dict(self.accuracy),
            "findings": [finding.to_json() for finding in self.findings],
            "attribution": None if self.attribution is None else self.attribution.to_json(),
            "known": [finding.key() for finding in self.known],
            "skipped": dict(self.skipped),
            "notes": list(self.notes),
        }
