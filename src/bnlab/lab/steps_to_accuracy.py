"""Who needs fewer steps to an accuracy: from accuracies that were judged now and then."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from bnlab.lab.records import Records, average, by_seed, distinct, learnt_threshold, number, seeds, where


@dataclass(frozen=True)
class Reached:
    """Between two judgements, at a step on the straight line from one to the other."""

    after: float
    at: float
    by: float


def best_test_top1(rows: Records) -> float:
    """A training's accuracy on test at the judgement that was best on val, the first of equals."""
    return number(max(rows, key=lambda row: number(row, "val_top1")), "test_top1")


def steps_to(rows: Records, target: float) -> Reached | None:
    """Where a training first had an accuracy on test above guessing; None where it never had.

    The first line begins at step 0, at guessing: what is reached before the first judgement was reached on the way.
    """
    start, then = 0.0, number(rows[0], "guess")
    for row in rows:
        step, here = number(row, "step"), number(row, "test_top1")
        if here >= target:
            return Reached(start, start + (step - start) * (target - then) / (here - then), step)
        start, then = step, here
    return None


class StepsToAccuracy:
    """Several arms to the best accuracy of one of them, seed by seed.

    An arm that never gets there counts as if it had with its last step, which favours it. Where the baseline's best is
    no better than guessing (`learnt_threshold`), there is nothing to get to, and the seed has no numbers.
    """

    def __init__(self, accuracies: Records, baseline: str) -> None:
        self.baseline = baseline
        self.seeds = seeds(accuracies)
        self.arms = [str(arm) for arm in distinct(accuracies, "arm")]
        self.best: Mapping[str, list[float]] = {arm: by_seed(accuracies, best_test_top1, arm=arm) for arm in self.arms}
        """on test, by arm, for each seed"""
        self.reached: dict[str, list[Reached | None]] = {arm: [] for arm in self.arms}
        """None where there is nothing to get to"""
        self.missed: dict[str, int] = dict.fromkeys(self.arms, 0)
        """in how many seeds an arm did not get there"""
        for seed, target in zip(self.seeds, self.best[baseline], strict=True):
            learnt = target > learnt_threshold(where(accuracies, arm=baseline, seed=seed)[0])
            for arm in self.arms:
                rows = where(accuracies, arm=arm, seed=seed)
                there = steps_to(rows, target) if learnt else None
                if learnt and there is None:
                    self.missed[arm] += 1
                    end = number(rows[-1], "step")
                    there = Reached(end, end, math.inf)
                self.reached[arm].append(there)

    def speedup(self, arm: str) -> tuple[float, ...]:
        """How many times fewer steps an arm takes than the baseline; NaN where a seed has no numbers."""
        pairs = zip(self.reached[self.baseline], self.reached[arm], strict=True)
        return tuple(slow.at / fast.at if slow and fast else math.nan for slow, fast in pairs)

    def speedup_if_resolved(self, factor: float, arm: str) -> tuple[float, ...]:
        """The same; NaN also where `factor` lies between the least and the most that the judgements allow."""
        pairs = zip(self.reached[self.baseline], self.reached[arm], strict=True)
        told = [bool(slow and fast and not _may_be(slow, fast, factor)) for slow, fast in pairs]
        return tuple(value if known else math.nan for value, known in zip(self.speedup(arm), told, strict=True))

    def mean_steps(self, arm: str) -> float:
        """To the baseline's best, over the seeds that have numbers."""
        return average([{"step": there.at} for there in self.reached[arm] if there], "step")

    @property
    def remarks(self) -> list[str]:
        """Who did not get there, and where there was nothing to get to."""
        n = len(self.seeds)
        sentences = [
            f"{arm} did not reach the best accuracy of {self.baseline} in {count} of {n} trainings, which count as if "
            "it had with their last step: what favours it"
            for arm, count in self.missed.items()
            if count
        ]
        if count := self.reached[self.baseline].count(None):
            sentences.append(f"{self.baseline} did no better than guess in {count} of {n} trainings: no race there")
        return sentences


def _may_be(slow: Reached, fast: Reached, factor: float) -> bool:
    least = slow.after / fast.by
    most = slow.by / fast.after if fast.after else math.inf
    return least <= factor <= most
