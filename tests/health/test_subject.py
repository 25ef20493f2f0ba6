"""What is diagnosed."""

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.health.batches import Batches
from bnlab.health.subject import Given, Noting, Subject


def test_it_calls_the_network_or_another_model() -> None:
    x = torch.randn(4, 3)
    batches = Batches([x], torch.device("cpu"))
    network = nn.ReLU()
    subject = Subject(
        model=network, network=network, layers={}, batches=batches, given=Given(), device=torch.device("cpu"), modes={}
    )
    batch = batches.sample(2)
    assert torch.equal(subject.call(batch), x[:2].relu())
    assert torch.equal(subject.call(batch, nn.Identity()), x[:2])


def test_an_error_of_the_callers_code_becomes_a_note() -> None:
    notes: list[str] = []
    with Noting(notes, "it could not be done"):
        raise ValueError("first line\nsecond line")
    with Noting(notes, "nor this"):
        raise RuntimeError
    assert notes == ["it could not be done (ValueError: first line)", "nor this (RuntimeError)"]


@pytest.mark.parametrize("error", [UsageError("what", "remedy"), KeyboardInterrupt()])
def test_bnlabs_errors_and_interruptions_pass(error: BaseException) -> None:
    notes: list[str] = []
    with pytest.raises(type(error)), Noting(notes, "it could not be done"):
        raise error
    assert notes == []
