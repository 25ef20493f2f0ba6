"""Restores a model after a diagnosis, whatever has happened in between: errors and Ctrl-C included."""

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def restored(
    *models: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    parameters: bool = False,
    generators: Iterable[torch.Generator] = (),
) -> Iterator[None]:
    """Restore models, an optimiser and generators of random numbers at the end.

    Of each module: its class, mode, attributes (such as momentum), hooks, and which tensors it has; of its buffers the
    values; with `parameters` also the values, the gradients and the requires_grad of the parameters. Generators: those
    of torch on all devices, of NumPy and of Python, and the given ones.
    """
    modules = {module: None for model in models for module in model.modules()}
    kept = [_Kept(module, parameters=parameters) for module in modules]
    kept_optimizer = None if optimizer is None else _KeptOptimizer(optimizer)
    given = [(generator, generator.get_state()) for generator in generators]
    numbers, python = np.random.get_state(), random.getstate()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices=[*devices]):
            yield
    finally:
        for module in kept:
            module.restore()
        if kept_optimizer is not None:
            kept_optimizer.restore()
        for generator, seed in given:
            generator.set_state(seed)
        np.random.set_state(numbers)
        random.setstate(python)


class _Kept:
    """What one module was."""

    def __init__(self, module: nn.Module, *, parameters: bool) -> None:
        self.module, self.kind = module, type(module)
        self.attributes = dict(vars(module))
        self.tables = {
            name: (table, dict(table))
            for name, table in vars(module).items()
            if name in ("_parameters", "_buffers", "_modules", *_HOOKS) and isinstance(table, dict)
        }
        self.mode = module.training
        self.buffers = [(b, b.detach().clone()) for b in module.buffers(recurse=False)]
        self.flags = [(p, p.requires_grad) for p in module.parameters(recurse=False)]
        self.parameters: list[tuple[Tensor, Tensor, Tensor | None, Tensor | None]] = []
        if parameters:
            for p in module.parameters(recurse=False):
                self.parameters.append((p, p.detach().clone(), p.grad, None if p.grad is None else p.grad.clone()))

    @torch.no_grad()
    def restore(self) -> None:
        module = self.module
        if type(module) is not self.kind:
            module.__class__ = self.kind
        attributes: dict[str, Any] = module.__dict__
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        module.training = self.mode  # of a scripted module, this is no attribute
        for table, items in self.tables.values():
            if [*table] != [*items] or any(table[key] is not items[key] for key in items):
                table.clear()
                table.update(items)
        for tensor, values in self.buffers:
            if not tensor.is_meta:
                tensor.copy_(values)
        for flag, before in self.flags:
            flag.requires_grad_(before)
        for tensor, values, grad, grad_values in self.parameters:
            tensor.copy_(values)
            tensor.grad = grad
            if grad is not None and grad_values is not None:
                grad.copy_(grad_values)


class _KeptOptimizer:
    """What an optimiser was. Its dictionaries and tensors remain the same objects."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.groups = [(group, dict(group)) for group in optimizer.param_groups]
        self.state = {p: {k: (v, copy.deepcopy(v)) for k, v in values.items()} for p, values in optimizer.state.items()}

    @torch.no_grad()
    def restore(self) -> None:
        del self.optimizer.param_groups[len(self.groups) :]
        for group, before in self.groups:
            group.clear()
            group.update(before)
        self.optimizer.state.clear()
        for parameter, values in self.state.items():
            for value, before in values.values():
                if isinstance(value, Tensor):
                    value.copy_(before)
            self.optimizer.state[parameter] = {
                key: value if isinstance(value, Tensor) else before for key, (value, before) in values.items()
            }
