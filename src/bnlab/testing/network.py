"""Asserts that the doctor finds no fault of batch normalisation in a network."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bnlab.errors import UsageError, did_you_mean
from bnlab.health.check import SEVERITIES, Severity
from bnlab.health.diagnose import diagnose
from bnlab.health.registry import all_checks
from bnlab.health.report import Report

_FIRST_ESTIMATE = "BN100"  # checks of smaller ids are exact; the others estimate, from more images than one batch


def check_network(
    model: nn.Module,
    batch: Any,
    *,
    labels: Callable[[Any], Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    select: Iterable[str] = (),
    ignore: Iterable[str] = (),
    fail_on: Severity = "error",
) -> Report:
    """Assert that the doctor finds no fault of batch normalisation in a network, and return its report.

    The network may be untrained: its accuracy is not judged. Everything is restored, as after `health.diagnose`.

    >>> report = bnlab.testing.check_network(model.eval(), torch.randn(16, 3, 32, 32))

    Args:
        model: any nn.Module, in evaluation mode.
        batch: one batch as the model gets it: a tensor, a tuple or a mapping, with or without labels. It has at least
            two images, since the doctor reports a layer that gets a single value for each channel (BN001).
        labels: takes the batch and returns the class of each image, where the batch does not show it.
        forward: takes the model and the batch, and returns the output.
        select: ids or names of the checks to make (default: the exact ones, whose ids are below BN100).
        ignore: ids or names of checks not to make.
        fail_on: the least severity that is a failure: error, warn or info.

    Raises:
        TypeError: the model is not an nn.Module.
        AssertionError: there are such findings; a line for each has its id, its name and what was measured.
        UsageError: there is no such check or severity, or the model cannot be run on the batch.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the first argument must be the model, an nn.Module, not {type(model).__name__}")
    if fail_on not in SEVERITIES:
        raise UsageError(f"there is no severity '{fail_on}'", did_you_mean(str(fail_on), list(SEVERITIES)))
    report = diagnose(
        model,
        [batch],
        labels=labels,
        forward=forward,
        checkpoint=model.state_dict(),
        backends=("channels_last",),
        select=[*select] or [entry.check.id for entry in all_checks() if entry.check.id < _FIRST_ESTIMATE],
        ignore=ignore,
    )
    found = report.at_or_above(fail_on)
    if found:
        lines = [f"{finding.severity} {finding.id} {finding.name}: {finding.message}" for finding in found]
        more = ", ".join(dict.fromkeys(f"`bnlab doctor --explain {finding.id}`" for finding in found))
        raise AssertionError("\n".join([*lines, f"Causes and remedies: {more}"]))
    return report
