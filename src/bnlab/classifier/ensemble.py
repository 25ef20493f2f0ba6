"""Several classifiers that answer as one: their probabilities are averaged (Ioffe & Szegedy 2015, sec. 4.2.3)."""

from collections.abc import Sequence

import numpy as np

from bnlab.classifier.predict import Classifier, Probabilities, classify_alike
from bnlab.data.cache import Cache
from bnlab.data.preprocess import Crops
from bnlab.errors import ClassifierError, PhotoError, UsageError, printable
from bnlab.progress import Progress


class Ensemble:
    """Classifiers of the same classes, in whatever order; each sees a photo at its own size and in its own view.

    >>> ensemble = Ensemble([Classifier.load("a.safetensors"), Classifier.load("b.safetensors")])
    >>> probabilities, errors = ensemble.classify(["tulip.jpg"], crops=144)
    """

    def __init__(self, members: Sequence[Classifier], names: Sequence[str] = ()) -> None:
        """`names` is what results and messages call the members; classifier 1, classifier 2, ... unless given.

        Raises:
            UsageError: there are no members, or not as many names.
            ClassifierError: a member knows a class that another does not.
        """
        self.members = tuple(members)
        self.names = tuple(names) or tuple(f"classifier {i}" for i in range(1, len(members) + 1))
        if not self.members or len(self.names) != len(self.members):
            raise UsageError(
                f"an ensemble of {len(self.members)} classifiers with {len(self.names)} names cannot be",
                "give at least one classifier, and each a name",
            )
        for name, member in zip(self.names, self.members, strict=True):
            self._check_classes(name, member)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities' columns: the first member's."""
        return self.members[0].classes

    def classify(
        self,
        paths: Sequence[str],
        *,
        batch_size: int = 32,
        workers: int = -1,
        progress: Progress | None = None,
        cache: Cache | None = None,
        crops: Crops = 1,
    ) -> tuple[Probabilities, list[PhotoError | None]]:
        """Mean probabilities of the members, len(paths) x classes, and each photo's error or None.

        Otherwise as `Classifier.classify`, and raises what `classify_each` raises.
        """
        each, errors = self.classify_each(
            paths, batch_size=batch_size, workers=workers, progress=progress, cache=cache, crops=crops
        )
        return mean_of(each), errors

    def classify_each(
        self,
        paths: Sequence[str],
        *,
        batch_size: int = 32,
        workers: int = -1,
        progress: Progress | None = None,
        cache: Cache | None = None,
        crops: Crops = 1,
    ) -> tuple[list[Probabilities], list[PhotoError | None]]:
        """Each member's probabilities, len(paths) x classes in the ensemble's order, and each photo's error or None.

        Photos are read once for all members that see the same squares of them.

        Raises:
            UsageError: the papers have no such number of crops; or there is a cache, which is of one view, and the
                members have several.
        """
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, member in enumerate(self.members):
            alike.setdefault(_squares_of(member, crops), []).append(i)
        if cache and len(alike) > 1:
            raise UsageError(f"a cache is of one view, and these classifiers have {len(alike)}", "leave the cache out")
        answers: dict[int, Probabilities] = {}
        errors: list[PhotoError | None] = [None] * len(paths)
        for indices in alike.values():
            found, their_errors = classify_alike(
                [self.members[i] for i in indices],
                paths,
                batch_size=batch_size,
                workers=workers,
                progress=progress,
                cache=cache,
                crops=crops,
            )
            answers |= zip(indices, found, strict=True)
            errors = [before or now for before, now in zip(errors, their_errors, strict=True)]
        return [self._in_order(answers[i], member.classes) for i, member in enumerate(self.members)], errors

    def _in_order(self, answers: Probabilities, classes: tuple[str, ...]) -> Probabilities:
        """The columns, which are of `classes`, in the ensemble's order."""
        if classes == self.classes:
            return answers
        place = {label: i for i, label in enumerate(classes)}
        return answers.take([place[label] for label in self.classes], axis=1)

    def _check_classes(self, name: str, member: Classifier) -> None:
        for knows, labels, lacks, others in (
            (self.names[0], self.classes, name, member.classes),
            (name, member.classes, self.names[0], self.classes),
        ):
            known = set(others)
            label = next((label for label in labels if label not in known), None)
            if label is not None:
                raise ClassifierError(
                    f"{printable(knows)} knows the class '{printable(label)}' and {printable(lacks)} does not",
                    "give classifiers of the same classes",
                )


def mean_of(each: Sequence[Probabilities]) -> Probabilities:
    """The mean of N x classes probabilities, summed in float64; of one, itself."""
    if len(each) == 1:
        return each[0]
    mean: Probabilities = np.asarray(np.mean(each, axis=0, dtype=np.float64), dtype=np.float32)
    return mean


def _squares_of(classifier: Classifier, crops: Crops) -> tuple[object, ...]:
    """What the squares it sees of a photo depend on."""
    preprocessing = classifier.card.preprocessing
    squares = (preprocessing.size, preprocessing.interpolation)
    return (*squares, preprocessing.resize, preprocessing.crop_fraction) if crops == 1 else squares
