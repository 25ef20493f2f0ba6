"""What is diagnosed."""

import torch
from torch import nn

from bnlab.health.batches import Batches
from bnlab.health.subject import Given, Subject


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
