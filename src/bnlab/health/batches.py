"""The batches of a diagnosis: how they are called, scored and run again, whatever they consist of.

A batch is a tensor; a tuple or list of tensors, the last of which may be the labels; or a mapping, which may have
labels under one of LABEL_KEYS. Images stand for whatever the examples are.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnlab.errors import DataError, UsageError
from bnlab.health.compare import Comparison, Floats, Kind

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_OUTPUT_KEYS = ("logits", "out", "output", "outputs", "scores")

Metric = Callable[[Any, Any], Tensor | float]
"""from the model's output and the batch to a score of each image, N, or of the batch; higher is better"""


@dataclass(frozen=True)
class Batch:
    """One batch on the device of the model: `whole` as it came, and the arguments and labels in it."""

    whole: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    labels: Tensor | None

    @property
    def images(self) -> Tensor:
        """The first tensor of the arguments, which has one row for each image."""
        return next(leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor))

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int, start: int = 0) -> "Batch":
        """Some of the images of the batch, as a batch; a list or tensor in it that has other rows is left as it is."""
        size, cut = len(self), slice(start, start + n)

        def part(value: Any) -> Any:
            return value[cut] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

        return Batch(
            tree_map(part, self.whole), tree_map(part, self.args), tree_map(part, dict(self.kwargs)), part(self.labels)
        )

    def with_images(self, images: Tensor) -> "Batch":
        """The batch with another first argument."""
        if self.args:
            return Batch(self.whole, (images, *self.args[1:]), self.kwargs, self.labels)
        key = next(key for key, value in self.kwargs.items() if isinstance(value, Tensor))
        return Batch(self.whole, (), {**self.kwargs, key: images}, self.labels)


@dataclass
class Batches:
    """Batches that can be run several times. Each pass gets the same ones, even from a loader that shuffles.

    Args:
        source: an iterable of batches. What can be read once only, such as a generator, is kept in memory.
        images: stop after the batch that reaches this number (None: all).
        labels: takes a batch and returns its labels, N or N x ... (default: found as the file's docstring says).
        forward: how to call the model with a batch as it came.
        metric: scores an output; without it, the share of correct classes does.

    Raises:
        UsageError: a batch has no tensor, or labels do not fit the outputs; or passes get different batches.
        DataError: there is no batch.
    """

    source: Iterable[Any]
    device: torch.device
    images: int | None = None
    labels: Callable[[Any], Any] | None = None
    forward: Callable[[nn.Module, Any], Any] | None = None
    metric: Metric | None = None
    _of_batches: bool = False  # whether the metric gave one score for several images
    _marks: list[tuple[int, float]] = field(default_factory=list)
    _started: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.source, Tensor):
            raise UsageError("batches is one tensor", "pass a list of batches, such as [batch], or a DataLoader")
        if isinstance(self.source, Mapping) or not isinstance(self.source, Iterable):
            kind = type(self.source).__name__
            raise UsageError(f"batches is of the type {kind}", "pass a list of batches or a DataLoader")
        if isinstance(self.source, Iterator):
            self.source = list(self._limited(self.source))
        own = getattr(self.source, "generator", None)
        self.generators = [own] if isinstance(own, torch.Generator) else []
        self._states = [(g, g.get_state()) for g in (torch.default_generator, *self.generators)]
        self._random, self._numpy = random.getstate(), np.random.get_state()

    def rewind(self) -> None:
        """Restore the generators by which a loader shuffles and augments."""
        for generator, state in self._states:
            generator.set_state(state)
        random.setstate(self._random)
        np.random.set_state(self._numpy)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches, from the first on; empty ones are left out."""
        self.rewind()
        number = 0
        if not self._started:
            self._marks.clear()  # of a pass that ended early
        for whole in self._limited(self.source):
            batch = self._read(whole)
            mark = len(batch), float(batch.images.detach().flatten()[:256].double().nansum())
            if self._started and (number >= len(self._marks) or self._marks[number] != mark):
                raise UsageError(
                    f"batch {number + 1} differs from one pass to the next, although the generators were restored",
                    "pass a list of batches, or a DataLoader that reads the same images each time",
                )
            if not self._started:
                self._marks.append(mark)
            number += 1
            yield batch
        if not number:
            raise DataError("there is no image in the batches", "pass at least one batch")
        self._started = True

    def sample(self, n: int) -> Batch:
        """The first n images, or as many as the first batch has."""
        self.rewind()
        for whole in self._limited(self.source):
            return self._read(whole).first(n)
        raise DataError("there is no image in the batches", "pass at least one batch")

    def some(self, n: int) -> list[Batch]:
        """The first n images, in as many batches as they take."""
        found: list[Batch] = []
        for batch in self:
            found.append(batch.first(n - sum(map(len, found))))
            if sum(map(len, found)) >= n:
                break
        return found

    def call(self, model: nn.Module, batch: Batch) -> Any:
        """The output of the model for the batch."""
        if self.forward is not None:
            return self.forward(model, batch.whole)
        return model(*batch.args, **batch.kwargs)

    def score(self, output: Any, batch: Batch) -> Tensor | None:
        """A score of each image, N float64 on the CPU; one for the batch if the metric gives no more; None without
        labels and metric. An output that is not finite scores 0 as a class.
        """
        if self.metric is not None:
            given = self.metric(output, batch.whole)
            score = torch.as_tensor(given).detach().double().cpu().flatten()
            if len(score) not in (1, len(batch)):
                raise UsageError(
                    f"metric gave {len(score)} scores for {len(batch)} images",
                    "return one score for each image, or one for the batch",
                )
            self._of_batches |= len(score) < len(batch)
            return score
        if batch.labels is None:
            return None
        scores, labels = logits(output), batch.labels
        if scores is None or scores.ndim < 2 or scores.shape[:1] + scores.shape[2:] != labels.shape:
            got = "no tensor" if scores is None else f"an output of shape {list(scores.shape)}"
            raise UsageError(
                f"labels of shape {list(labels.shape)} do not fit {got}", "pass metric=, which scores an output"
            )
        if labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if high >= scores.shape[1] or (low < 0 and labels.ndim == 1):
                wrong = high if high >= scores.shape[1] else low
                raise UsageError(
                    f"a label is {wrong}, but the model has {scores.shape[1]} classes, 0 to {scores.shape[1] - 1}",
                    "pass labels that are class indices, in the order of the model's outputs",
                )
        right = (scores.argmax(1) == labels) & scores.isfinite().all(1)
        counted = labels >= 0  # in segmentation, negative labels mark what is not counted
        if labels.ndim == 1:
            return right.double().cpu()
        return (right & counted).flatten(1).double().sum(1).div(counted.flatten(1).sum(1).clamp(min=1)).cpu()

    @property
    def kind(self) -> Kind:
        """What the scores are, once there are some."""
        if self.metric is None:
            return "accuracy"
        return "metric of batches" if self._of_batches else "metric"

    def compare(self, before: Floats, after: Floats) -> Comparison:
        """Compare two scores of these images."""
        return Comparison.measure(before, after, self.kind)

    def _limited(self, source: Iterable[Any]) -> Iterator[Any]:
        seen = 0
        for whole in source:
            size = next((len(t) for t in tree_leaves(_plain(whole)) if isinstance(t, Tensor) and t.ndim), None)
            if size is None:
                kind = type(whole).__name__
                raise UsageError(
                    f"a batch of the type {kind} has no tensor",
                    "pass tensors, tuples that begin with one, or mappings of tensors",
                )
            if size:
                yield whole
            seen += size
            if self.images is not None and seen >= self.images:
                return

    def _read(self, whole: Any) -> Batch:
        whole = tree_map(lambda v: v.to(self.device) if isinstance(v, Tensor) else v, _plain(whole))
        given = None if self.labels is None else self.labels(whole)
        if given is not None:
            given = torch.as_tensor(given, device=self.device)
        if isinstance(whole, Tensor):
            return Batch(whole, (whole,), {}, given)
        if isinstance(whole, Mapping):
            key = next((key for key in LABEL_KEYS if key in whole), None)
            found = whole[key] if key is not None and isinstance(whole[key], Tensor) else None
            kwargs = {name: value for name, value in whole.items() if name != key}
            return Batch(whole, (), kwargs, _as_labels(found) if given is None else given)
        *args, last = whole
        if args and (given is not None or self.metric is not None or _as_labels(last, len(args[0])) is not None):
            return Batch(whole, tuple(args), {}, _as_labels(last, len(args[0])) if given is None else given)
        return Batch(whole, tuple(whole), {}, given)


def logits(output: Any) -> Tensor | None:
    """The first tensor of an output, or the one that it calls logits or the like."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        named = (output.get(key) for key in _OUTPUT_KEYS)
        return next((t for t in [*named, *output.values()] if isinstance(t, Tensor)), None)
    if isinstance(output, tuple | list):
        return next((t for t in output if isinstance(t, Tensor)), None)
    return getattr(output, "logits", None)


def _as_labels(value: Any, size: int | None = None) -> Tensor | None:
    """The value if it can be the class of each image: an integer tensor, N or N x ..."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool or not value.ndim:
        return None
    return value.long() if size is None or len(value) == size else None


def _plain(batch: Any) -> Any:
    """Mappings of other classes, such as a tokeniser's, as dict."""
    return dict(batch) if isinstance(batch, Mapping) else batch
