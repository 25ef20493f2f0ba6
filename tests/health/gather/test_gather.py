"""The evidence as a whole."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnlab.health import diagnose
from bnlab.health.gather.gather import classes_in_batch


def test_classes_in_a_batch() -> None:
    labels = torch.arange(4).repeat_interleave(8)
    found, shuffled = classes_in_batch(labels, [8, 8, 8, 8]) or (0, 0)
    assert found == 1
    drawn = [len(torch.unique(labels[torch.randperm(32)[:8]])) for _ in range(4000)]
    assert shuffled == pytest.approx(np.mean(drawn), abs=0.03)
    assert classes_in_batch(None, [8, 8]) is None


def test_layers_come_in_the_order_of_their_calls() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.first = nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu())

    torch.manual_seed(0)
    evidence = diagnose(Model().eval(), [torch.randn(8, 4), torch.randn(3, 4)]).evidence
    assert [*evidence.layers] == ["first", "last", "unused"]
    assert (evidence.images, evidence.batches, evidence.batch_size, evidence.last_batch_size) == (11, 2, 8, 3)
    first = evidence.layers["first"]
    assert (first.calls, first.depth, first.dims, first.values_per_image, first.activation) == (1, 0, 2, 1, "relu")
    assert first.batch is not None
    assert first.batch.count == 11
    assert evidence.layers["unused"].batch is None
