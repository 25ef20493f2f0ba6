"""What a check is, and what it reports.

Each file of `checks/` has a CHECK, which says what the check is, and a function `check(evidence) -> list[Finding]`. The
file's docstring is the check's page in the documentation; its headings are always those of HEADINGS.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bnlab.errors import plural
from bnlab.health.compare import Comparison

Severity = Literal["error", "warn", "info"]
"""error: an exact fact that makes results wrong; warn: a test and an effect size say so; info: advice"""
Stage = Literal["stable", "preview"]
"""preview: not yet shown to be silent on every sound network that it was tried on"""
Safety = Literal["safe", "unsafe", "display only"]
"""of a remedy. safe: it cannot change what was trained; unsafe: it may; display only: the caller's code must change"""

SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the worst first
HEADINGS = ("What it measures", "Why it is bad", "Reported when", "Known limits", "Remedy", "References")
RECALIBRATE = "bnlab.norm.recalibrate(model, batches)"
"""the command of findings that recalibration repairs; `bnlab doctor` shows what does the same to the user's files"""
_NAMED_LAYERS = 8  # in the text of a finding


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a check reports about a network."""

    id: str
    name: str
    """the fault, such as stale-statistics"""
    severity: Severity
    message: str
    """what was measured and where: sentences without a full stop at the end"""
    layers: tuple[str, ...] = ()
    """names of the layers that have the fault, the worst first"""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    cost: Comparison | None = None
    """the scores with the fault (before) and without it (after); None: not measured"""
    cause: str
    """the likely cause"""
    remedy: str
    safety: Safety
    command: str = ""
    """the command or the line of code that repairs it; MODEL and FOLDER stand for the user's own"""

    def __str__(self) -> str:
        parts = [f"{self.id} {self.name}: {self.message}"]
        if self.cost is not None:
            parts.append(f"it costs {'accuracy' if self.cost.is_accuracy else 'performance'}: {self.cost}")
        return f"{'; '.join(parts)}. Likely cause: {self.cause}. Remedy: {self.remedy}"

    def key(self) -> str:
        """What makes two findings the same one, for a baseline of known findings."""
        return finding_key(self.id, self.layers)

    def to_json(self) -> dict[str, Any]:
        cost = self.cost
        return {
            "id": self.id,
            "name": self.name,
            "severity": self.severity,
            "layers": list(self.layers),
            "message": self.message,
            "numbers": dict(self.numbers),
            "cost_points": None if cost is None else (100 * cost.gain if cost.is_accuracy else cost.gain),
            "interval": None if cost is None else [100 * x if cost.is_accuracy else x for x in cost.interval],
            "p": None if cost is None else cost.p_value,
            "cause": self.cause,
            "remedy": self.remedy,
            "safety": self.safety,
            "command": self.command or None,
        }


@dataclass(frozen=True, kw_only=True)
class Check:
    """What a check is."""

    id: str
    name: str
    severity: Severity
    stage: Stage
    safety: Safety
    needs: tuple[str, ...] = ()
    """the parts of the evidence without which it is not made; see `evidence.PARTS`"""
    reads: tuple[str, ...] = ()
    """the parts that it reads, too, where they were measured"""
    images: int = 0
    """how many it takes at least"""

    def finding(self, *, message: str, cause: str, remedy: str, **more: Any) -> Finding:
        """A finding of this check; severity and safety are the check's unless given."""
        given = {"severity": self.severity, "safety": self.safety} | more
        return Finding(id=self.id, name=self.name, message=message, cause=cause, remedy=remedy, **given)


def finding_key(id: str, layers: Iterable[str]) -> str:
    """The check's id and the layers, in any order."""
    return " ".join([id, *sorted(layers)])


def sections(page: str) -> tuple[str, dict[str, str]]:
    """The title of a check's docstring, and its sections by heading."""
    title, *parts = re.split(r"^## (.+)\n", page.strip() + "\n", flags=re.MULTILINE)
    return title.strip(), {heading: text.strip() for heading, text in zip(parts[::2], parts[1::2], strict=True)}


def name_layers(names: tuple[str, ...] | list[str], of: int | None = None) -> str:
    """For example "2 of 5 layers (conv1.bn, conv2.bn)"."""
    shown = ", ".join(name or "the model itself" for name in names[:_NAMED_LAYERS])
    more = f", and {len(names) - _NAMED_LAYERS} more" if len(names) > _NAMED_LAYERS else ""
    number = plural(len(names), "layer") if of is None else f"{len(names)} of {plural(of, 'layer')}"
    return f"{number} ({shown}{more})"
