"""Several classifiers that answer as one: their probabilities are averaged (Ioffe & Szegedy 2015, sec. 4.2.3)."""

from collections.abc import Sequence

import numpy as np

from bnlab.classifier.predict import Classifier, Probabilities
from bnlab.errors import ClassifierError, UsageError, printable


class Ensemble:
    """Classifiers of the same classes, in any order; each takes a photo at its own size, with its own preprocessing.

    >>> ensemble = Ensemble([Classifier.load("a.safetensors"), Classifier.load("b.safetensors")])
    >>> each, errors = classify(ensemble.members, ["tulip.jpg"], crops=144)
    >>> probabilities = mean_of(ensemble.in_order(each))
    """

    def __init__(self, members: Sequence[Classifier], names: Sequence[str] = ()) -> None:
        """`names` is what results and messages call the members (default: classifier 1, classifier 2, ...).

        Raises:
            UsageError: there are no members, or not as many names.
            ClassifierError: a member has a class that another has not.
        """
        self.members = tuple(members)
        self.names = tuple(names) or tuple(f"classifier {i}" for i in range(1, len(members) + 1))
        if not self.members or len(self.names) != len(self.members):
            raise UsageError(
                f"an ensemble of {len(self.members)} classifiers with {len(self.names)} names is not valid",
                "pass at least one classifier, and a name for each",
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


def mean_of(each: Sequence[Probabilities]) -> Probabilities:
    """The mean of N x classes probabilities, summed in float64; of one, itself."""
    if len(each) == 1:
        return each[0]
    return np.asarray(np.mean(each, axis=0, dtype=np.float64), dtype=np.float32)
