import warnings

import pytest
import torch
from torch import nn

from bnlab.norm.models import hooked, unwrap_model


def test_what_a_wrapper_holds() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    assert unwrap_model(network) is network
    assert unwrap_model(nn.DataParallel(network)) is network
    assert unwrap_model(torch.compile(nn.DataParallel(network), backend="eager")) is network


def test_what_cannot_be_worked_on() -> None:
    with pytest.raises(TypeError, match=r"^the model comes first, an nn.Module, not list$"):
        unwrap_model([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=r"^the model has lazy layers without tensors yet: run it once on a batch$"):
        unwrap_model(nn.LazyLinear(2))
    with pytest.raises(
        ValueError, match=r"^the model is on the meta device, where tensors hold no values: move it and"
    ):
        unwrap_model(nn.Linear(2, 2, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own
        scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"^a scripted model does not show its layers: give the model that it was made"
    ):
        unwrap_model(scripted)


@pytest.mark.parametrize(
    "watch",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_whether_something_watches(watch: str) -> None:
    layer = nn.Linear(2, 2)
    assert not hooked(layer)
    handle = getattr(layer, watch)(lambda *_: None)
    assert hooked(layer)
    handle.remove()
    assert not hooked(layer)
