"""What the tests of all studies use."""

import math
import warnings
from collections.abc import Callable

from bnlab.lab.experiment import Experiment
from bnlab.lab.study import Conclusion
from bnlab.lab.verdict import Evidence
from bnlab.report.plots import plot_svg

MakeExperiment = Callable[..., Experiment]


def has_no_number(evidence: Evidence) -> list[bool]:
    """For each seed, whether it shows nothing."""
    return [math.isnan(value) for value in evidence.values]


def draw(conclusion: Conclusion) -> None:
    """Draw all plots; a warning of the library that draws them is an error."""
    assert conclusion.plots
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plot in conclusion.plots.values():
            assert plot.title in plot_svg(plot)
