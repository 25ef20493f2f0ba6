"""Measures a classifier on photos whose classes are known."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnlab.classifier.ensemble import Ensemble, mean_of
from bnlab.classifier.predict import Classifier, Probabilities, classify
from bnlab.data.cache import Cache
from bnlab.data.photo_file import PhotoReader
from bnlab.data.photos import Photo, Photos
from bnlab.data.preprocess import Crops
from bnlab.data.scan import Refusal
from bnlab.errors import ClassifierError, DataError, DivergedError, plural, printable
from bnlab.progress import Progress

BINS = 15  # of the reliability diagram, as Guo et al. 2017 (On Calibration of Modern Neural Networks) have it


@dataclass(frozen=True, kw_only=True)
class ClassScore:
    """The scores of one class, in 0..1; None where undefined (no photo of the class, or none predicted as it)."""

    label: str
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Photos whose predicted class has a probability in one range: the mean probability, and the accuracy."""

    n: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Member:
    """One classifier of an ensemble, evaluated alone."""

    classifier: str
    """its name in the ensemble; commands use the path of the file"""
    top1: float
    """accuracy on the ensemble's n photos, in 0..1"""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A classifier's probabilities for n photos, and the metrics that follow from them. All fractions are in 0..1."""

    split: str
    classes: tuple[str, ...]
    paths: tuple[str, ...]
    """the n photos"""
    targets: NDArray[np.int64]
    """n true class indices"""
    probabilities: Probabilities
    """n x classes"""
    refused: tuple[Refusal, ...] = ()
    """photos that could not be used, and are not counted"""
    crops: int = 1
    """crops of each photo whose probabilities were averaged"""
    members: tuple[Member, ...] = ()
    """the members of an ensemble; empty for a single classifier"""
    reader: PhotoReader = field(default_factory=PhotoReader)
    """opens the photos as the (first) classifier takes them"""

    def __repr__(self) -> str:
        return f"<Evaluation {', '.join(self.facts())}>"

    def facts(self) -> tuple[str, ...]:
        """What a line on it says: the split, how many photos and classes, and the top-1."""
        return self.split, f"n = {self.n}", plural(len(self.classes), "class"), f"top-1 {self.top1:.1%}"

    @property
    def n(self) -> int:
        return len(self.targets)

    @cached_property
    def predicted(self) -> NDArray[np.int64]:
        """n most probable class indices."""
        return np.asarray(self.probabilities.argmax(1), np.int64)

    @property
    def top1(self) -> float:
        """Fraction of photos whose most probable class is the true one."""
        return float((self.predicted == self.targets).mean())

    @property
    def top5(self) -> float:
        """Fraction of photos whose class is among the five most probable; 1 if there are no more than five classes.

        Ties are ranked as in `predicted`: the lower index first. (scikit-learn's top_k_accuracy_score ranks the higher
        index first, and takes no probabilities of two classes.)
        """
        best = np.argsort(-self.probabilities, axis=1, kind="stable")[:, :5]
        return float((best == self.targets[:, None]).any(1).mean())

    @property
    def top1_interval(self) -> tuple[float, float]:
        """95% interval of top-1 (Wilson 1927), for photos drawn independently."""
        from scipy.stats import binomtest

        num_correct = int((self.predicted == self.targets).sum())
        interval = binomtest(num_correct, self.n).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood of the true class, in nats."""
        true = self.probabilities[np.arange(self.n), self.targets]
        return float(-np.log(np.maximum(true, np.finfo(np.float32).tiny)).mean())

    @cached_property
    def bins(self) -> list[Bin]:
        """The reliability diagram: photos in BINS equal ranges of the predicted class's probability."""
        confidence = self.probabilities.max(1).astype(np.float64)
        correct = self.predicted == self.targets
        which = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
        return [
            Bin(n=int(here.sum()), confidence=float(confidence[here].mean()), accuracy=float(correct[here].mean()))
            for here in (which == b for b in range(BINS))
            if here.any()
        ]

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |accuracy - confidence| of the bins, by size (Naeini et al. 2015)."""
        return sum(b.n * abs(b.accuracy - b.confidence) for b in self.bins) / self.n

    @cached_property
    def confusion(self) -> NDArray[np.int64]:
        """classes x classes counts: row the true class, column the predicted one."""
        from sklearn.metrics import confusion_matrix

        return np.asarray(confusion_matrix(self.targets, self.predicted, labels=np.arange(len(self.classes))), np.int64)

    @cached_property
    def per_class(self) -> list[ClassScore]:
        """Precision, recall and F1 of each class, in the order of the classes."""
        from sklearn.metrics import precision_recall_fscore_support

        scores = precision_recall_fscore_support(
            self.targets, self.predicted, labels=np.arange(len(self.classes)), zero_division=np.nan
        )
        return [
            ClassScore(label=label, n=int(n), precision=_known(p), recall=_known(r), f1=_known(f))
            for label, p, r, f, n in zip(self.classes, *scores, strict=True)
        ]

    def mistakes(self) -> list[int]:
        """Indices of the wrongly classified photos, the most confident mistake first."""
        wrong = np.flatnonzero(self.predicted != self.targets)
        return [int(i) for i in wrong[np.argsort(-self.probabilities[wrong].max(1), kind="stable")]]

    def to_json(self) -> dict[str, Any]:
        """The document of `bnlab evaluate --json`."""
        document = {
            "split": self.split,
            "n": self.n,
            "top1": self.top1,
            "top5": self.top5,
            "top1_interval": list(self.top1_interval),
            "ece": self.ece,
            "classes": list(self.classes),
            "per_class": [vars(score) for score in self.per_class],
            "confusion": self.confusion.tolist(),
            "refused": [{"path": refusal.path, "reason": refusal.reason} for refusal in self.refused],
            "crops": self.crops,
        }
        return document | ({"members": [vars(member) for member in self.members]} if self.members else {})


def evaluate(
    classifier: Classifier | Ensemble,
    photos: Sequence[Photo],
    split: str,
    *,
    batch_size: int = 32,
    workers: int = -1,
    progress: Progress | None = None,
    cache: Cache | None = None,
    crops: Crops = 1,
    reader: PhotoReader | None = None,
) -> Evaluation:
    """Classify photos and compare with their labels, matched by name; the options are those of `classify`.

    For an ensemble, the result has each member's own accuracy as well.

    Raises:
        ClassifierError: the classifier does not know a photo's class.
        DataError: not one photo could be used.
        DivergedError: the network's outputs are not finite.
        UsageError: an unknown number of crops.
    """
    photos = Photos.of(photos)
    for label in photos.labels:
        if label not in classifier.classes:
            known = ", ".join(printable(name) for name in classifier.classes[:20])
            raise ClassifierError(
                f"the photos have the class '{printable(label)}', which the classifier does not know",
                f"it knows {known}; rename or remove that folder",
            )
    paths, reader = photos.paths, reader or PhotoReader()
    ensemble = classifier if isinstance(classifier, Ensemble) else Ensemble([classifier], ["the network"])
    answers, errors = classify(
        ensemble.members,
        paths,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        cache=cache,
        crops=crops,
        reader=reader,
    )
    each = ensemble.in_order(answers)
    usable = np.array([error is None for error in errors], dtype=bool)
    refused = tuple(Refusal(error.path, error.reason, photos[i].label) for i, error in enumerate(errors) if error)
    if not usable.any():
        why = f" (the first: {refused[0].reason})" if refused else ""
        raise DataError(f"not one of {len(paths)} photos could be used{why}", "replace them or give another folder")
    for name, probabilities in zip(ensemble.names, each, strict=True):
        if not np.isfinite(probabilities[usable]).all():
            raise DivergedError(
                f"the probabilities of {printable(name)} on {split} are not finite",
                "train with a lower learning_rate",
            )
    targets = photos.class_indices(classifier.classes)[usable]
    members: list[Member] = []
    if ensemble is classifier:
        right = [probabilities[usable].argmax(1) == targets for probabilities in each]
        members = [Member(name, float(of_one.mean())) for name, of_one in zip(ensemble.names, right, strict=True)]
    return Evaluation(
        split=split,
        classes=classifier.classes,
        paths=tuple(path for path, good in zip(paths, usable, strict=True) if good),
        targets=targets,
        probabilities=mean_of(each)[usable],
        refused=refused,
        crops=crops,
        members=tuple(members),
        reader=replace(reader, pixel_range=ensemble.members[0].card.preprocessing.pixel_range),
    )


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
