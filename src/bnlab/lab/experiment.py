"""What a study measures with: photos, seeds and budget, and the recipes by which its networks are trained."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bnlab.config import load_settings
from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.lab.lr_selection import mark_chosen
from bnlab.lab.measurements import Measurement, measure_all
from bnlab.lab.records import Results, Value, joined
from bnlab.lab.splits import StudySplits
from bnlab.lab.trained_network import measure_accuracy
from bnlab.nets import registry
from bnlab.progress import Progress
from bnlab.recipe import Recipe

Budget = Literal["quick", "full"]
T = TypeVar("T")

# What a user may set for every training: how much and on what, but nothing that arms differ in or that rules rest on.
SETTABLE = (
    *("size", "resize", "crop_fraction", "crop_area", "crop_aspect", "pre_resize", "flip", "mean", "std"),
    *("pixel_range", "max_megapixels"),
    *("width", "stem"),
    *("steps", "epochs", "batch_size", "validate_every", "checkpoint_seconds"),
)

# The networks of most studies: Inception, and small enough for dozens of trainings.
WITH_BN, WITHOUT_BN = "with BN", "without BN"
_SMALL = {WITH_BN: "bn_small_inception", WITHOUT_BN: "small_inception"}
_LARGE = {WITH_BN: "bn_googlenet", WITHOUT_BN: "googlenet"}

# Recipe keys with which a training is plain gradient descent at a constant rate.
PLAIN_DESCENT: Mapping[str, Any] = {"momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}


def check_options(study: str, options: Mapping[str, Any], own_keys: Collection[str] = ()) -> None:
    """Refuse recipe keys that a user may not set, such as `own_keys`, which this study sets itself.

    Raises:
        RecipeError: a value is out of range.
        UsageError: the study sets this key itself, or no recipe has it.
    """
    settable = [key for key in SETTABLE if key not in own_keys]
    for key in options:
        if key not in Recipe.model_fields:
            raise UsageError(f"a recipe has no key '{printable(key)}'", did_you_mean(key, settable))
        if key not in settable:
            raise UsageError(f"the study {study} sets {key} itself", f"leave it out; you may set {', '.join(settable)}")
    load_settings("default", options)
    if options.get("steps") == 0:
        raise UsageError("with steps 0 nothing is trained", "set 1 or more, or set epochs")


@dataclass(kw_only=True)
class Experiment:
    """The means of a study. It makes measurements and runs them."""

    name: str
    splits: StudySplits
    budget: Budget
    seeds: tuple[int, ...]
    device: str
    processes: int
    folder: Path  # Where measurements are kept.
    progress: Progress
    options: Mapping[str, Any] = field(default_factory=dict)  # Recipe keys that the user set for every training.
    seconds: float = 0.0  # The time that the measurements of this study took, whenever they were made.

    def by_budget(self, quick: T, full: T) -> T:
        return quick if self.budget == "quick" else full

    @property
    def recalibration_images(self) -> int:
        """How many photos of train the statistics are recalibrated on before each validation."""
        return self.by_budget(256, 1024)

    @property
    def small(self) -> bool:
        """Whether networks are small, as they are for digits and for the budget quick."""
        return self.budget == "quick" or self.splits.kind == "digits"

    def network_pair(self) -> dict[str, str]:
        """One network with and without BN, by arm."""
        return dict(_SMALL if self.small else _LARGE)

    def paper_recipe(self, name: str, **options: Any) -> Recipe:
        """A recipe of the paper's section 4.2, such as bn-x5, on an Inception that suits photos and budget."""
        network = ("" if name == "inception" else "bn_") + ("small_inception" if self.small else "inception")
        if self.small:
            options["local_response"] = False  # the small network has none to configure
        return self.recipe(network, base=name, **options)

    def recipe(self, network: str, *, base: str | None = None, **options: Any) -> Recipe:
        """A recipe for a network: the shipped one called `base`, or the one that suits the photos, with changes.

        The changes are, in this order, what all trainings of studies have in common (float32, one size, no label
        smoothing), `options`, and the user's keys. Studies give the length in `steps`, so that arms with different
        batches compare. Networks without normalisation begin with weights scaled on a batch (LSUV), unless `options`
        have an initialisation.
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
            common["lsuv_init"] = True  # otherwise it depends on the seed whether it trains
        if digits and base is not None:  # the shipped recipes for photos flip, and a flipped digit is not a digit
            common |= {"flip": 0.0, "crop_area": (0.7, 1.0), "crop_aspect": (0.9, 1 / 0.9)}
        if self.budget == "quick" and network in _SMALL.values():
            common["width"] = 0.5
        if "epochs" in self.options and "steps" not in self.options:
            options["steps"] = 0  # steps take precedence over epochs
        name = base or ("digits" if digits else "default")
        return load_settings(name, {**common, **options, **self.options}).recipe

    def measurement(
        self,
        do: Callable[..., Results],
        seed: int,
        *,
        labels: Mapping[str, Value] | None = None,
        steps: int = 0,
        **settings: Any,
    ) -> Measurement:
        """The measurement `do(job, **settings)`. It takes `steps` steps, or, with 0, those of its recipe."""
        recipe = settings.get("recipe")
        if isinstance(recipe, Recipe):  # its seed is that of the measurement, so that studies can share trainings
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

    def measurements(
        self,
        arms: Mapping[str, Recipe],
        do: Callable[..., Results] = measure_accuracy,
        *,
        column: str = "arm",
        labels: Mapping[str, Value] | None = None,
        **settings: Any,
    ) -> list[Measurement]:
        """A measurement `do(job, recipe=..., **settings)` for each arm and seed, labelled by the arm in `column`."""
        return [
            self.measurement(do, seed, labels={column: arm, **(labels or {})}, recipe=recipe, **settings)
            for arm, recipe in arms.items()
            for seed in self.seeds
        ]

    def run(self, measurements: Sequence[Measurement], *, one_at_a_time: bool = False) -> Results:
        """The tables of all measurements, each row with the labels of its measurement in front.

        What was measured before is not measured again. `one_at_a_time` is for measurements of time.
        """
        done = measure_all(
            measurements,
            folder=self.folder,
            device=self.device,
            processes=0 if one_at_a_time else self.processes,
            title=self.name,
            progress=self.progress,
        )
        self.seconds += sum(each.seconds for each in done)
        return joined((made.labels, each.results) for each, made in zip(done, measurements, strict=True))

    def run_learning_rates(
        self,
        arms: Mapping[str, Recipe],
        rates: Sequence[float],
        do: Callable[..., Results] = measure_accuracy,
        **settings: Any,
    ) -> Results:
        """The tables of each arm at each learning rate. The rows of the best rate have `chosen` 1.

        The best rate of each arm and seed is the one with the highest last accuracy on val. So no arm is held back by
        the rate of another, and the test accuracies of these rows are not those that the choice was made by.
        """
        measurements: list[Measurement] = []
        for arm, recipe in arms.items():
            for rate in rates:
                at_rate = {arm: recipe.model_copy(update={"learning_rate": rate})}
                measurements += self.measurements(at_rate, do, labels={"learning_rate": rate}, **settings)
        return mark_chosen(self.run(measurements))
