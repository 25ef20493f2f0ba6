"""Batches of all kinds: what is an argument, what is a label, and that each pass gets the same ones."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from bnlab.errors import DataError, UsageError
from bnlab.health.batches import Batches, logits

CPU = torch.device("cpu")
X, Y = torch.arange(24.0).reshape(4, 6), torch.tensor([0, 1, 2, 0])


def read(source: Any, **options: Any) -> Any:
    return next(iter(Batches([source], CPU, **options)))


@pytest.mark.parametrize(
    ("source", "args", "kwargs", "labelled"),
    [
        (X, 1, [], False),
        ((X, Y), 1, [], True),
        ([X, Y], 1, [], True),
        ((X, X), 2, [], False),
        ((X, X, Y), 2, [], True),
        ((X, Y.float()), 2, [], False),
        ((X, Y[:, None]), 1, [], True),
        ({"x": X, "labels": Y}, 0, ["x"], True),
        ({"x": X, "mask": X > 1}, 0, ["x", "mask"], False),
    ],
    ids=["tensor", "pair", "list", "two inputs", "three", "targets", "labels of positions", "mapping", "no labels"],
)
def test_labels_are_found(source: Any, args: int, kwargs: list[str], labelled: bool) -> None:
    batch = read(source)
    assert (len(batch.args), [*batch.kwargs], batch.labels is not None) == (args, kwargs, labelled)
    assert len(batch) == 4


def test_labels_may_be_found_by_the_caller() -> None:
    batch = read((X, {"class": Y}), labels=lambda whole: whole[1]["class"])
    assert torch.equal(batch.labels, Y)
    assert len(batch.args) == 1


def test_with_a_metric_the_last_element_is_the_target() -> None:
    batches = Batches([(X, Y.float())], CPU, metric=lambda output, whole: -(output - whole[1]).abs())
    batch = next(iter(batches))
    assert len(batch.args) == 1
    score = batches.score(Y.float() + 1, batch)
    assert score is not None
    assert score.tolist() == [-1, -1, -1, -1]


def test_a_metric_of_another_number_of_scores_is_refused() -> None:
    batches = Batches([X], CPU, metric=lambda output, whole: torch.zeros(3))
    with pytest.raises(UsageError, match="3 scores for 4 images"):
        batches.score(X, next(iter(batches)))


def test_scores_of_classes() -> None:
    batches = Batches([(X, Y)], CPU)
    batch = next(iter(batches))
    output = torch.eye(3)[[0, 1, 1, 2]]
    output[3] = torch.nan
    score = batches.score(output, batch)
    assert score is not None
    assert score.tolist() == [1, 1, 0, 0]


def test_scores_of_segmentation_leave_out_negative_labels() -> None:
    labels = torch.tensor([[[0, 1], [1, -1]]])
    batches = Batches([(torch.zeros(1, 3, 2, 2), labels)], CPU)
    output = torch.zeros(1, 2, 2, 2)
    output[:, 1] = 1.0
    score = batches.score(output, next(iter(batches)))
    assert score is not None
    assert score.tolist() == [pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("output", "labels", "message"),
    [
        (torch.zeros(4, 2), Y, "a label is 2, but the model has 2 classes, 0 to 1"),
        (torch.zeros(4, 5), Y - 1, "a label is -1"),
        (torch.zeros(4), Y, r"labels of shape \[4\] do not fit an output of shape \[4\]"),
        ("text", Y, "do not fit no tensor"),
    ],
)
def test_labels_that_do_not_fit_are_refused(output: Any, labels: Tensor, message: str) -> None:
    batches = Batches([(X, labels)], CPU)
    with pytest.raises(UsageError, match=message):
        batches.score(output, next(iter(batches)))


@pytest.mark.parametrize(
    ("source", "message"),
    [(X, "batches is one tensor"), (7, "of the type int"), ({"x": X}, "of the type dict"), (["text"], "type str")],
)
def test_what_is_no_batches_is_refused(source: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(Batches(source, CPU))


@pytest.mark.parametrize("source", [[], [X[:0]]], ids=["none", "empty"])
def test_no_image_is_refused(source: Any) -> None:
    with pytest.raises(DataError, match="no image"):
        list(Batches(source, CPU))


class Augmented(Dataset[Tensor]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        return torch.rand(3) + float(np.random.rand()) + i


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(1)], ids=["global", "own"])
def test_a_loader_that_shuffles_and_augments_gives_the_same_batches(generator: torch.Generator | None) -> None:
    batches = Batches(DataLoader(Augmented(), 4, shuffle=True, generator=generator), CPU)
    first, second = ([batch.images for batch in batches] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(first) == 3


def test_batches_that_differ_are_refused() -> None:
    class Counter:
        n = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.n += 1
            yield X + self.n

    batches = Batches(Counter(), CPU)
    list(batches)
    with pytest.raises(UsageError, match="batch 1 differs from one pass to the next"):
        list(batches)


def test_what_can_be_read_once_is_kept_up_to_the_limit() -> None:
    read_so_far = []

    def stream() -> Iterator[Tensor]:
        for i in range(100):
            read_so_far.append(i)
            yield X + i

    batches = Batches(stream(), CPU, images=10)
    assert [len(list(batches)) for _ in range(2)] == [3, 3]
    assert len(read_so_far) == 3


def test_a_sample_and_the_first_images() -> None:
    batches = Batches(DataLoader(TensorDataset(X, Y), 4), CPU)
    batch = batches.sample(2)
    assert len(batch) == 2
    assert torch.equal(batch.labels, Y[:2])  # type: ignore[arg-type]
    assert torch.equal(batch.whole[0], X[:2])
    changed = batch.with_images(X[:2] * 2)
    assert torch.equal(changed.images, X[:2] * 2)


def test_a_model_is_called_with_what_is_no_label() -> None:
    class Two(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    batches = Batches([(X, 2 * X, Y)], CPU)
    assert torch.equal(batches.call(Two(), next(iter(batches))), -X)
    batches = Batches([{"a": X, "b": X, "target": Y}], CPU)
    assert torch.equal(batches.call(Two(), next(iter(batches))), 0 * X)
    batches = Batches([X], CPU, forward=lambda model, batch: model(batch, batch[0]))
    assert torch.equal(batches.call(Two(), next(iter(batches))), X - X[0])


def test_logits_of_outputs() -> None:
    class Output:
        logits = X

    assert logits(Output()) is X
    assert logits({"aux": Y, "logits": X}) is X
    assert logits((X, Y)) is X
    assert logits("text") is None


def test_a_pass_that_ends_early_does_not_count() -> None:
    batches = Batches([torch.zeros(2, 3), torch.ones(2, 3)], torch.device("cpu"))
    next(iter(batches))
    assert [len(batch) for _ in range(2) for batch in batches] == [2, 2, 2, 2]
