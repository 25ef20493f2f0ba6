"""How many steps each arm of a study needs to reach an accuracy, from accuracies that were measured now and then."""

import math
from dataclasses import dataclass
from statistics import fmean

from bnlab.lab.records import Records, by_seed, distinct, learnt_threshold, number, seeds, where


@dataclass(frozen=True)
class Reached:
    """Between the validations after `after` and `by` steps, at step `at` on the straight line between them."""

    after: float
    at: float
    by: float


_NO_NUMBERS = Reached(math.nan, math.nan, math.nan)


def best_test_top1(rows: Records) -> float:
    """The test accuracy at the validation that was best on val, the first of equals."""
    return number(max(rows, key=lambda row: number(row, "val_top1")), "test_top1")


def steps_to(rows: Records, target: float) -> Reached:
    """Where a training first had this test accuracy, which is above the majority baseline.

    Accuracy is taken to rise from the majority baseline at step 0 to that of the first validation. A training that
    never had it counts as if it had with its last step, but `by` is infinite.
    """
    previous_step, previous = 0.0, number(rows[0], "guess")
    for row in rows:
        step, top1 = number(row, "step"), number(row, "test_top1")
        if top1 >= target:
            at = previous_step + (step - previous_step) * (target - previous) / (top1 - previous)
            return Reached(previous_step, at, step)
        previous_step, previous = step, top1
    return Reached(previous_step, previous_step, math.inf)


class StepsToAccuracy:
    """The steps that several arms need to the best accuracy of one of them, the baseline, seed by seed.

    An arm that never reaches it counts as if it had with its last step, which favours the arm. A seed has no numbers if
    the baseline's best accuracy is no better than `learnt_threshold`.
    """

    def __init__(self, accuracies: Records, baseline: str) -> None:
        self.baseline = baseline
        self.seeds = seeds(accuracies)
        arms = [str(arm) for arm in distinct(accuracies, "arm")]
        self.best = {arm: by_seed(accuracies, best_test_top1, arm=arm) for arm in arms}
        """Test accuracy by arm, for each seed."""
        self.reached: dict[str, list[Reached]] = {arm: [] for arm in arms}
        """By arm, for each seed; NaN if the seed has no numbers."""
        for seed, target in zip(self.seeds, self.best[baseline], strict=True):
            learnt = target > learnt_threshold(where(accuracies, arm=baseline, seed=seed)[0])
            for arm, reached in self.reached.items():
                reached.append(steps_to(where(accuracies, arm=arm, seed=seed), target) if learnt else _NO_NUMBERS)

    def speedup(self, arm: str, factor: float | None = None) -> list[float]:
        """The baseline's steps over those of the arm, for each seed; NaN if the seed has no numbers.

        With `factor`, NaN also if the validations are too far apart to show whether the speedup is above it.
        """
        pairs = zip(self.reached[self.baseline], self.reached[arm], strict=True)
        return [math.nan if factor and _may_be(factor, slow, fast) else slow.at / fast.at for slow, fast in pairs]

    def mean_steps(self, arm: str) -> float:
        """The mean over the seeds that have numbers."""
        steps = [reached.at for reached in self.reached[arm] if not math.isnan(reached.at)]
        return fmean(steps) if steps else math.nan

    @property
    def remarks(self) -> list[str]:
        """Which arms did not reach the accuracy, and how many seeds have no numbers."""
        n = len(self.seeds)
        sentences = []
        for arm, reached in self.reached.items():
            if count := sum(math.isinf(each.by) for each in reached):
                sentences.append(
                    f"{arm} did not reach the best accuracy of {self.baseline} in {count} of {n} trainings; these "
                    "count as if it had with their last step, which favours it"
                )
        if count := sum(math.isnan(each.at) for each in self.reached[self.baseline]):
            sentences.append(
                f"{self.baseline} did no better than guess in {count} of {n} trainings, which give no speed"
            )
        return sentences


def _may_be(factor: float, slow: Reached, fast: Reached) -> bool:
    """Whether the steps of `slow` over those of `fast` may be `factor`, for all that the validations show."""
    lowest = slow.after / fast.by
    highest = slow.by / fast.after if fast.after else math.inf
    return lowest <= factor <= highest
