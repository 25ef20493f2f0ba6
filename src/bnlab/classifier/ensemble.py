"""Several classifiers that answer as one."""

from collections.abc import Iterable, Sequence
from os import PathLike

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.classifier.predict import AnyPath, Classifier, Prediction, Probabilities, predict_photos
from bnlab.data.photo_input import PhotoInput
from bnlab.errors import ClassifierError, UsageError, printable
from bnlab.progress import Progress
from bnlab.recipe import MAX_MEGAPIXELS


class Ensemble:
    """Classifiers that answer as one: their probabilities are averaged (Ioffe & Szegedy 2015, sec. 4.2.3).

    They have the same classes, in any order; each takes a photo at its own size, with its own preprocessing.

    >>> from bnlab import Classifier, Ensemble
    >>> ensemble = Ensemble([Classifier.load("runs/train"), Classifier.load("flowers.safetensors")])
    >>> len(ensemble.predict(["tulip.jpg"])[0].top)
    3
    """

    def __init__(self, members: Sequence[Classifier], names: Sequence[str] = ()) -> None:
        """`names` is what results and messages call the members (default: classifier 1, classifier 2, ...).

        Raises:
            UsageError: there are no members, or not as many names.
            ClassifierError: a member has a class that another has not.
        """
        self.members = tuple(members)
        if not self.members or not all(isinstance(member, Classifier) for member in self.members):
            raise UsageError("an ensemble needs one or more classifiers", "pass a list of Classifier.load(FILE)")
        self.names = tuple(names) or tuple(f"classifier {i}" for i in range(1, len(members) + 1))
        if len(self.names) != len(self.members):
            raise UsageError(
                f"an ensemble of {len(self.members)} classifiers with {len(self.names)} names is not valid",
                "pass a name for each classifier",
            )
        first = self.names[0]
        for name, member in zip(self.names, self.members, strict=True):
            odd = set(self.classes) ^ set(member.classes)
            for label in (*self.classes, *member.classes):
                if label in odd:
                    has, lacks = (first, name) if label in self.classes else (name, first)
                    raise ClassifierError(
                        f"{printable(has)} has the class '{printable(label)}' and {printable(lacks)} has not",
                        "use classifiers of the same classes",
                    )

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the first member's order, which is the ensemble's."""
        return self.members[0].classes

    def in_order(self, each: Sequence[Probabilities]) -> list[Probabilities]:
        """The members' probabilities with the columns in the ensemble's order of classes."""
        columns = [{label: i for i, label in enumerate(member.classes)} for member in self.members]
        return [
            answers.take([column[label] for label in self.classes], axis=1)
            for column, answers in zip(columns, each, strict=True)
        ]

    def predict(
        self,
        photos: PhotoInput | Iterable[PhotoInput],
        *,
        top: int = 5,
        batch_size: int = 32,
        max_megapixels: float = MAX_MEGAPIXELS,
        progress: Progress | None = None,
    ) -> list[Prediction]:
        """One prediction for each photo, as `Classifier.predict` makes them, from the members' mean probabilities."""
        return predict_photos(
            self.members,
            lambda each: mean_of(self.in_order(each)),
            photos,
            top=top,
            batch_size=batch_size,
            max_megapixels=max_megapixels,
            progress=progress,
        )

    def predict_proba(self, batch: NDArray[np.uint8] | torch.Tensor, *, batch_size: int = 32) -> Probabilities:
        """The mean of the members' probabilities, N x classes, for a batch as `Classifier.predict_proba` takes it."""
        return mean_of(self.in_order([member.predict_proba(batch, batch_size=batch_size) for member in self.members]))

    def __repr__(self) -> str:
        return f"<Ensemble of {len(self.members)}: {', '.join(map(repr, self.members))}>"


_CLASSIFIERS = "pass a classifier file, the folder of a run or a Classifier, or a list of these; or an Ensemble"
AnyClassifier = AnyPath | Classifier | Ensemble | Sequence[AnyPath | Classifier]


def open_classifiers(given: AnyClassifier, device: str = "auto") -> Ensemble:
    """A classifier, or several, as an ensemble, which may have one member; files are read.

    Raises:
        ClassifierError: a file cannot be read, or a member has a class that another has not.
        UsageError: there is no such device, a classifier in memory is on another one, or there are no classifiers.
    """
    if isinstance(given, Ensemble):
        members, names = list(given.members), list(given.names)
    else:
        several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        for one in several:
            if not isinstance(one, str | PathLike | Classifier):
                raise UsageError(f"a classifier cannot be of the type {type(one).__name__}", _CLASSIFIERS)
        if not several:
            raise UsageError("there is no classifier", _CLASSIFIERS)
        members = [one if isinstance(one, Classifier) else Classifier.load(one, device) for one in several]
        names = [str(member.path or f"classifier {i}") for i, member in enumerate(members, start=1)]
    for name, member in zip(names, members, strict=True):
        if device not in ("auto", torch.device(member.device).type):
            raise UsageError(f"{printable(name)} is on {member.device}, not on {device}", "leave device out")
    return Ensemble(members, names)


def mean_of(each: Sequence[Probabilities]) -> Probabilities:
    """The mean of N x classes probabilities, summed in float64; of one, itself."""
    if len(each) == 1:
        return each[0]
    return np.asarray(np.mean(each, axis=0, dtype=np.float64), dtype=np.float32)
