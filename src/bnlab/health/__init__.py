"""The doctor: finds faults of batch normalisation in any PyTorch model, explains and repairs them."""

from bnlab.health import repairs
from bnlab.health.check import Check, Finding
from bnlab.health.compare import Comparison
from bnlab.health.diagnose import diagnose
from bnlab.health.epoch import Health, LayerHealth
from bnlab.health.repair import Applied, Repaired, repair
from bnlab.health.report import Report
from bnlab.health.watch import Watch, watch

__all__ = [
    "Applied",
    "Check",
    "Comparison",
    "Finding",
    "Health",
    "LayerHealth",
    "Repaired",
    "Report",
    "Watch",
    "diagnose",
    "repair",
    "repairs",
    "watch",
]
