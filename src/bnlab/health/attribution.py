"""How many points of a gap between batch and running statistics each repair explains."""

from dataclasses import dataclass
from typing import Any

from bnlab.health.compare import Comparison


@dataclass(frozen=True, kw_only=True)
class Explained:
    """One repair: what it gains alone, and what is lost if all repairs but this one are applied."""

    cause: str
    """stale statistics, small batches, augmentation, dropout, domain, resolution, mode or preprocessing"""
    check: str
    """id of the check that finds it"""
    alone: Comparison
    without: Comparison | None = None


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """The gap, and what explains it. All numbers are of the same images."""

    gap: Comparison
    """by running and by batch statistics"""
    causes: tuple[Explained, ...]
    together: Comparison | None
    """with all repairs that help, alone or with the others"""

    @property
    def unexplained(self) -> float:
        """What remains of the gap after all repairs, in points; 0 also where they give more than batch statistics."""
        after = self.gap.before if self.together is None else self.together.after
        return max(0.0, 100 * (self.gap.after - after))

    def to_json(self) -> dict[str, Any]:
        return {
            "gap": self.gap.to_json(),
            "causes": [
                {
                    "cause": c.cause,
                    "check": c.check,
                    "alone": c.alone.to_json(),
                    "without": c.without and c.without.to_json(),
                }
                for c in self.causes
            ],
            "together": self.together and self.together.to_json(),
            "unexplained_points": self.unexplained,
        }
