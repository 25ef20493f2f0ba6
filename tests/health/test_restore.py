"""After `restored`, a model, an optimiser and generators are what they were, to the byte."""

import copy
import random
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bnlab.health.restore import restored


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(16, 2))


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Everything that the issue names, as bytes and plain values."""
    return (
        {name: (t.dtype, t.numpy(force=True).tobytes()) for name, t in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.numpy().tobytes()) for p in model.parameters()],
        [
            (type(m), m.training, getattr(m, "momentum", 0), [*m._forward_hooks], sorted(vars(m)))
            for m in model.modules()
        ],
        copy.deepcopy(optimizer.state_dict()),
        [id(group) for group in optimizer.param_groups],
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        str(np.random.get_state()),
    )


def change_everything(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model.train()
    norm = model[1]
    model(torch.randn(4, 3, 4, 4)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 7
    norm.momentum, norm.extra = 0.9, 1
    norm.running_mean = None
    norm.register_forward_hook(lambda *_: None)
    norm.running_var[0] = -0.0
    norm.__class__ = nn.BatchNorm1d
    model.add_module("more", nn.ReLU())
    model[0].bias.requires_grad_(False)
    model[4].weight = nn.Parameter(torch.zeros(2, 16))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    random.random()
    np.random.rand()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_everything_is_restored(error: type[BaseException] | None) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3, 4, 4)).sum().backward()
    optimizer.step()
    model[1].running_var[0] = 0.0
    state = next(iter(optimizer.state.values()))["exp_avg"]
    before, tensors = snapshot(model, optimizer), [id(t) for t in model.state_dict(keep_vars=True).values()]
    try:
        with restored(model, optimizer=optimizer, parameters=True):
            change_everything(model, optimizer)
            assert snapshot(model, optimizer) != before
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert str(snapshot(model, optimizer)) == str(before)
    assert [id(t) for t in model.state_dict(keep_vars=True).values()] == tensors
    assert next(iter(optimizer.state.values()))["exp_avg"] is state


def test_nan_and_given_generators_are_restored() -> None:
    model, generator = network(), torch.Generator().manual_seed(3)
    model[1].running_mean[0] = torch.nan
    seed = generator.get_state()
    with restored(model, generators=[generator]):
        torch.rand(1, generator=generator)
        model[1].running_mean.zero_()
    assert model[1].running_mean[0].isnan()
    assert torch.equal(generator.get_state(), seed)


def test_a_handle_still_removes_its_hook() -> None:
    model = network()
    handle = model[0].register_forward_hook(lambda *_: None)
    with restored(model):
        model[0]._forward_hooks.clear()
    assert isinstance(model[0]._forward_hooks, OrderedDict)
    handle.remove()
    assert not model[0]._forward_hooks
