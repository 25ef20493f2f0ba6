"""How the sources of images are read, and the batches by which each source is measured."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnlab.errors import UsageError
from bnlab.health import Report, diagnose


def diagnosed(source: object, sizes: tuple[int, ...] = (32, 32), **options: object) -> Report:
    """Images x have their number as the first value, and the source is a function of it."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).eval()
    numbers = torch.arange(float(sum(sizes)))
    torch.manual_seed(0)
    x = torch.stack([numbers, torch.randn(len(numbers))], 1)
    labels = torch.zeros(len(x), dtype=torch.long)
    given = [*zip(x.split(list(sizes)), labels.split(list(sizes)), strict=True)]
    return diagnose(model, given, sources=source, select=["BN023"], **options)  # type: ignore[arg-type]


def halves(batch: tuple[Tensor, Tensor]) -> list[str]:
    return ["left" if number % 2 else "right" for number in batch[0][:, 0].int().tolist()]


@pytest.mark.parametrize("kind", [list, np.array])
def test_sources_may_have_names(kind: object) -> None:
    found = diagnosed(lambda batch: kind(halves(batch))).evidence.parts["sources"]  # type: ignore[operator]
    assert found.images == {"left": 32, "right": 32}
    assert found.layers["left"]["0"].mean[0] == pytest.approx(32)  # of 1, 3, ... 63
    assert found.layers["right"]["0"].mean[0] == pytest.approx(31)


def test_a_source_with_few_images_is_left_out() -> None:
    def three(batch: tuple[Tensor, Tensor]) -> list[str]:
        return [
            "rare" if number % 21 == 0 else half for number, half in zip(batch[0][:, 0], halves(batch), strict=True)
        ]

    found = diagnosed(three).evidence.parts["sources"]
    assert set(found.images) == {"left", "right"}


def test_a_source_with_less_than_a_batch_is_scored_too() -> None:
    """The model gives class 0 to what lies above the mean of its source, so half of the images are right."""
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    torch.manual_seed(0)
    x = torch.cat([torch.randn(64, 1), torch.randn(20, 1) + 100])[torch.randperm(84)]
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in x.split(32)]
    report = diagnose(model, batches, sources=lambda batch: (batch[0][:, 0] > 50).int(), select=["BN023"])
    cost = report.evidence.parts["sources"].cost
    assert (cost.n, cost.after) == (84, pytest.approx(0.5, abs=0.1))


def test_one_source_is_noted() -> None:
    report = diagnosed(lambda batch: ["one"] * len(batch[0]))
    assert "BN023" in report.skipped
    assert any("1 source of 1" in note for note in report.notes)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (lambda batch: [0], "sources= gave 1 value for a batch of 32 images"),
        (lambda batch: batch[0][:, 0], "sources= names more than 32 sources"),
    ],
    ids=["one for all", "one for each"],
)
def test_sources_that_do_not_fit_are_refused(source: object, problem: str) -> None:
    with pytest.raises(UsageError, match=f"^{problem}"):
        diagnosed(source)


def test_an_error_of_the_callers_function_is_noted() -> None:
    def failing(batch: object) -> object:
        raise KeyError("camera")

    report = diagnosed(failing)
    assert "BN023" in report.skipped
    assert any("KeyError" in note for note in report.notes)


def test_each_source_is_measured_in_batches_of_the_usual_size() -> None:
    """Of 2 x 32 images with two sources, each gives 16 images a batch: they are run as one batch of 32."""
    sizes: list[int] = []

    class Noted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return x

    torch.manual_seed(0)
    source = torch.arange(64) % 2
    x = torch.randn(64, 4) + 3 * source[:, None]
    model = nn.Sequential(Noted(), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    given = [*zip(x.split(32), (x[:, 0] > 3 * source).long().split(32), source.split(32), strict=True)]
    report = diagnose(
        model,
        given,
        labels=lambda batch: batch[1],
        forward=lambda network, batch: network(batch[0]),
        sources=lambda batch: batch[2],
        select=["BN023"],
    )
    assert report["BN023"].cost is not None
    # after the main passes: by running statistics, by source; two whole batches; by the statistics of the source
    assert sizes[-10:] == [16] * 4 + [32] * 2 + [16] * 4
