"""Merging what several processes of a training saved."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnlab import norm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), norm.BatchNorm1d(3), nn.Linear(3, 2))


def state_of(x: Tensor) -> dict[str, Tensor]:
    """What a process saves whose statistics are those of its images."""
    model = network()
    norm.recalibrate(model, [x])
    return model.state_dict()


def test_the_merged_statistics_are_those_of_all_images() -> None:
    torch.manual_seed(1)
    parts = torch.randn(300, 4) + 3, torch.randn(100, 4) - 3
    merged = norm.merge_ranks([*map(state_of, parts)], [300, 100])
    together = state_of(torch.cat(parts))
    torch.testing.assert_close(merged["1.running_mean"], together["1.running_mean"])
    torch.testing.assert_close(merged["1.running_var"], together["1.running_var"], rtol=0.01, atol=0)  # n or n - 1
    averaged = sum(state_of(part)["1.running_var"] for part in parts) / 2
    assert bool((merged["1.running_var"] > 2 * averaged).all())
    assert torch.equal(merged["0.weight"], together["0.weight"])


def test_whitening_merges_covariances() -> None:
    states: list[dict[str, Tensor]] = []
    torch.manual_seed(2)
    parts = torch.randn(200, 4, 1, 1) + torch.tensor([2.0, -2, 0, 0]).view(1, 4, 1, 1), torch.randn(200, 4, 1, 1)
    for part in (*parts, torch.cat(parts)):
        layer = norm.Whitening2d(4, groups=2)
        norm.recalibrate(layer, [part])
        states.append(layer.state_dict())
    merged = norm.merge_ranks(states[:2])
    torch.testing.assert_close(merged["running_covariance"], states[2]["running_covariance"], rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda states: ([states[0]], None), "two or more"),
        (lambda states: (states[0], None), "two or more"),
        (lambda states: (states, [1]), "a number for each of the 2"),
        (lambda states: (states, [0, 0]), "a number for each"),
        (lambda states: (states, [1, float("nan")]), "a number for each"),
        (lambda states: ([states[0], states[1] | {"1.weight": torch.ones(7)}], None), "tensor 1.weight"),
        (lambda states: ([states[0], {k: v for k, v in states[1].items() if k != "1.bias"}], None), "lacks .* 1.bias"),
    ],
    ids=["one", "a mapping", "too few numbers", "no images", "not a number", "shape", "missing"],
)
def test_what_does_not_fit_is_refused(change: Any, text: str) -> None:
    states = [network().state_dict(), network().state_dict()]
    with pytest.raises(ValueError, match=text):
        norm.merge_ranks(*change(states))


def test_what_is_no_tensor_stays_that_of_the_first() -> None:
    states: list[Any] = [state_of(torch.randn(20, 4)) | {"_extra_state": number} for number in (1, 2)]
    assert norm.merge_ranks(states)["_extra_state"] == 1
