"""Which tensors a checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bnlab import health
from bnlab.health.gather.checkpoint import SavedEvidence, read_checkpoint
from tests.health.checks.networks import sound_network, teacher_batches

STATE = {"a.weight": torch.ones(2, 2), "a.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "given",
    [
        STATE,
        {"state_dict": STATE},
        {"epoch": 1, "model": STATE, "optimizer": {"state": {"x": {n: torch.ones(1) for n in "abc"}}}},
        {"net": {"weights": STATE}, "epoch": torch.tensor(3)},
    ],
    ids=["plain", "nested", "beside an optimiser", "deep"],
)
def test_tensors_are_found_in_mappings(given: dict[str, Any]) -> None:
    assert read_checkpoint(given) == STATE


def test_tensors_are_read_from_files(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "a.pt")
    found = read_checkpoint(str(tmp_path / "a.pt"))
    assert {key: value.tolist() for key, value in found.items()} == {k: v.tolist() for k, v in STATE.items()}


def saved(checkpoint: dict[str, Tensor]) -> SavedEvidence:
    network = sound_network()
    part = health.diagnose(network, teacher_batches(network), checkpoint=checkpoint).evidence.parts["checkpoint"]
    assert isinstance(part, SavedEvidence)
    return part


def test_parameters_that_are_missing_or_others_are_counted() -> None:
    state = sound_network().state_dict()
    assert saved(state) == SavedEvidence(tensors=len(state), fitting=len(state))
    less = {key: value for key, value in state.items() if key != "0.weight"}
    assert (saved(less).missing_parameters, saved(less).fitting) == (1, len(state) - 1)
    assert saved(state | {"0.weight": state["0.weight"] + 1}).other_weights == 1


def test_weights_in_half_precision_are_the_same_as_exactly_as_it_can_tell() -> None:
    state = sound_network().state_dict()
    half = saved({key: value.half() if value.is_floating_point() else value for key, value in state.items()})
    assert (half.differing, half.other_weights) == ((), 0)


def test_tensors_of_other_shapes_do_not_fit() -> None:
    state = sound_network().state_dict()
    part = saved(state | {"1.running_mean": torch.zeros(5)})
    assert (part.missing, part.fitting) == (("1",), len(state) - 1)


def test_one_of_several_sets_is_no_prefix() -> None:
    """A file of two sets has their names before those of the tensors, which load_state_dict never sees."""
    state = sound_network().state_dict()
    both = {f"model.{key}": value for key, value in state.items()}
    part = saved(both | {f"ema.{key}": value + 1 for key, value in state.items()})
    assert (part.missing, part.renamed, part.prefix) == ((), (), "")
