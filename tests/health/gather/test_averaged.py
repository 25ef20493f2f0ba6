"""Which network an averaged model holds."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bnlab.health.gather.averaged import unwrapped
from tests.health.checks.networks import sound_network


class Ema(nn.Module):
    """As timm's ModelEmaV2."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_wrappers_are_opened() -> None:
    raw = sound_network()
    assert isinstance(unwrapped(AveragedModel(raw), raw), nn.Sequential)
    assert unwrapped(Ema(nn.DataParallel(raw)), raw) is raw
    assert unwrapped(raw, raw) is raw
    compiled = torch.compile(raw, backend="eager")
    assert unwrapped(Ema(compiled), raw) is raw  # type: ignore[arg-type]


def test_a_network_that_is_itself_of_one_part_is_not_opened() -> None:
    raw = Ema(sound_network())
    assert unwrapped(AveragedModel(raw), raw).__class__ is Ema
    assert unwrapped(raw, raw) is raw
