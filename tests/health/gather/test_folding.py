"""What folding says of a network."""

import torch
from torch import nn

from bnlab import health
from bnlab.health.gather.folding import Folded
from tests.health.checks.networks import sound_network, teacher_batches


def test_layers_that_are_kept_come_with_the_reason() -> None:
    network = nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU(), *sound_network()).eval()
    part = health.diagnose(network, [torch.randn(16, 3, 8, 8)]).evidence.parts["folding"]
    assert isinstance(part, Folded)
    assert (part.folded, [*part.kept]) == (("4", "7"), ["1"])
    assert part.kept["1"]
    assert part.parity.images == 8


def test_what_cannot_be_tried_is_a_note() -> None:
    class Uncopied(nn.Module):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise RuntimeError("no copies")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    network = nn.Sequential(Uncopied(), *sound_network()).eval()
    report = health.diagnose(network, teacher_batches(sound_network()))
    assert "folding" not in report.evidence.parts
    assert any("folding could not be tried (RuntimeError" in note for note in report.notes)
