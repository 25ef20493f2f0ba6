"""What a study measures with: its photos, seeds and budget, and the recipes that its networks are trained by."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bnlab.config import load_settings
from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.lab.lr_selection import mark_chosen
from bnlab.lab.measurements import Measurement, measure_all
from bnlab.lab.records import Results, Value, joined, labelled
from bnlab.lab.splits import StudySplits
from bnlab.lab.trained_network import measure_accuracy
from bnlab.nets import registry
from bnlab.progress import Progress
from bnlab.recipe import Recipe

Budget = Literal["quick", "full"]
T = TypeVar("T")

# What a user may set for every training: how much and on what, but nothing that arms differ in or that rules rest on.
SETTABLE = (
    "size",
    "resize",
    "crop_fraction",
    "crop_area",
    "crop_aspect",
    "pre_resize",
    "flip",
    "mean",
    "std",
    "width",
    "stem",
    "steps",
    "epochs",
    "batch_size",
    "validate_every",
    "checkpoint_seconds",
)

# The networks of most studies: small enough for dozens of trainings, and Inception all the same.
WITH_BN, WITHOUT_BN = "with BN", "without BN"
_SMALL = {WITH_BN: "bn_small_inception", WITHOUT_BN: "small_inception"}
_LARGE = {WITH_BN: "bn_googlenet", WITHOUT_BN: "googlenet"}


def check_options(study: str, options: Mapping[str, Any], owned: Collection[str] = ()) -> None:
    """Refuse what a user may not set; `owned` are keys that this study sets itself besides.

    Raises:
        RecipeError: a value is out of range.
        UsageError: the study sets this key itself, or it is none of a recipe.
    """
    free = [key for key in SETTABLE if key not in owned]
    for key in options:
        if key not in free:
            if key not in Recipe.model_fields:
                raise UsageError(f"a recipe has no key '{printable(key)}'", did_you_mean(key, free))
            raise UsageError(
                f"{key} is what the study {study} sets itself", f"leave it out; it takes {', '.join(free)}"
            )
    load_settings("default", options)
    if options.get("steps") == 0:
        raise UsageError("steps 0 are no training", "give 1 or more, or epochs in their place")


@dataclass(kw_only=True)
class Experiment:
    """A study's place of work; `run` measures."""

    name: str
    """of the study"""
    splits: StudySplits
    budget: Budget
    seeds: tuple[int, ...]
    device: str
    processes: int
    folder: Path
    """where measurements are kept"""
    progress: Progress
    options: Mapping[str, Any] = field(default_factory=dict)
    """recipe keys that the user set, for every training"""
    seconds: float = 0.0
    """that all measurements of the study took, whenever they were made"""

    def by_budget(self, quick: T, full: T) -> T:
        """The value for the budget."""
        return quick if self.budget == "quick" else full

    @property
    def recalibration_images(self) -> int:
        """How many photos of train statistics are measured on before a judgement."""
        return self.by_budget(256, 1024)

    def network_pair(self) -> dict[str, str]:
        """The names of one network with and without BN: small for grey digits and for what has to be quick."""
        return dict(_SMALL if self.budget == "quick" or self.splits.kind == "digits" else _LARGE)

    def recipe(self, network: str, *, base: str | None = None, **options: Any) -> Recipe:
        """A recipe for a study's network: the shipped one called `base`, or the one that suits the photos.

        Over it come what all trainings of studies share (float32, one size, no label smoothing), then `options`, then
        the user's own. Studies say how long to train in `steps`, so that arms with other batches compare. Networks
        without normalisation begin with weights scaled on a batch, unless the study says what they begin with.
        """
        digits = self.splits.kind == "digits"
        common: dict[str, Any] = {
            "network": network,
            "precision": "float32",
            "label_smoothing": 0.0,
            "start_size": 1.0,
            "recalibration_images": self.recalibration_images,
            "bn_monitor": False,
            "workers": 0,
            "cache": "ram",
            "size": 32 if digits else self.by_budget(32, 128),
        }
        if registry.find(network).norm == "none" and "initialisation" not in options:
            common["lsuv_init"] = True  # else it trains from some first weights and not from others
        if digits and base is not None:  # a shipped recipe for photos must not mirror digits
            common |= {"flip": 0.0, "crop_area": (0.7, 1.0), "crop_aspect": (0.9, 1 / 0.9)}
        if self.budget == "quick" and network in _SMALL.values():
            common["width"] = 0.5
        if "epochs" in self.options and "steps" not in self.options:
            options["steps"] = 0  # which would else go before them
        name = base or ("digits" if digits else "default")
        return load_settings(name, {**common, **options, **self.options}).recipe

    def measurements(
        self,
        arms: Mapping[str, Recipe],
        do: Callable[..., Results] = measure_accuracy,
        *,
        column: str = "arm",
        labels: Mapping[str, Value] | None = None,
        **settings: Any,
    ) -> list[Measurement]:
        """A cell for each arm and seed: `do(job, recipe=..., **settings)`; its rows say which in `column`."""
        return [
            self.measurement(do, seed, labels={column: arm, **(labels or {})}, recipe=recipe, **settings)
            for arm, recipe in arms.items()
            for seed in self.seeds
        ]

    def measurement(
        self,
        do: Callable[..., Results],
        seed: int,
        *,
        labels: Mapping[str, Value] | None = None,
        steps: int = 0,
        **settings: Any,
    ) -> Measurement:
        """One measurement; `steps` is its share of the work, where it is not that of its recipe."""
        recipe = settings.get("recipe")
        if isinstance(recipe, Recipe):  # one seed, one key, also where a study shares a training with another
            settings = {**settings, "recipe": recipe.model_copy(update={"seed": seed})}
            steps = steps or recipe.steps or recipe.epochs * -(-len(self.splits) // recipe.batch_size)
        return Measurement(
            do=do,
            split=self.splits.for_seed(seed),
            seed=seed,
            settings=settings,
            labels={**(labels or {}), "seed": seed},
            steps=max(1, steps),
        )

    def run(self, measurements: Sequence[Measurement], *, one_at_a_time: bool = False) -> Results:
        """Measure, or take what was measured before; the cells' rows, each with its labels in front.

        `one_at_a_time`: one after the other, for what is timed is slower beside others.
        """
        done = measure_all(
            measurements,
            folder=self.folder,
            device=self.device,
            processes=0 if one_at_a_time else self.processes,
            title=self.name,
            progress=self.progress,
        )
        self.seconds += sum(one.seconds for one in done)
        return joined(labelled(one.results, cell.labels) for one, cell in zip(done, measurements, strict=True))

    def run_learning_rates(
        self,
        arms: Mapping[str, Recipe],
        rates: Iterable[float],
        do: Callable[..., Results] = measure_accuracy,
        **settings: Any,
    ) -> Results:
        """Each arm at each learning rate; rows of the best one have `chosen` 1.

        The best is chosen for each arm and seed by its last accuracy on val, so what these rows say of test was not
        chosen by test, and an arm is not held back by a rate that suits another.
        """
        measurements = [
            self.measurement(
                do,
                seed,
                labels={"arm": arm, "learning_rate": rate},
                recipe=recipe.model_copy(update={"learning_rate": rate}),
                **settings,
            )
            for arm, recipe in arms.items()
            for rate in rates
            for seed in self.seeds
        ]
        return mark_chosen(self.run(measurements))
