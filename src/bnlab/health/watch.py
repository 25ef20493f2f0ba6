"""Watches the batch normalisation of anyone's network while anyone's loop trains it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol, Self, runtime_checkable
from weakref import ReferenceType, WeakMethod, ref

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import UsageError
from bnlab.health.bn_monitor import BNMonitor
from bnlab.health.check import Finding
from bnlab.health.epoch import Health
from bnlab.norm.layers import batch_norm_layers
from bnlab.norm.model_utils import unwrap
from bnlab.progress import LOG


@runtime_checkable
class SummaryWriter(Protocol):
    """What is used of torch.utils.tensorboard.SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, /) -> object: ...
    def add_text(self, tag: str, text_string: str, global_step: int, /) -> object: ...


Log = SummaryWriter | Callable[[int, Health], object]


class Watch(AbstractContextManager["Watch"]):
    """Measures the layers while the model is trained within this context; see `watch`."""

    def __init__(self, model: nn.Module, *, log: Log | None, every: int, window: int, report_every: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"the first argument must be the model, an nn.Module, not {type(model).__name__}")
        if report_every < 1:
            raise UsageError(f"report_every={report_every}", "pass the number of forwards between reports, at least 1")
        try:
            self._network = unwrap(model)
            self._monitor = BNMonitor(self._network, window=window, every=every)
        except ValueError as error:
            problem, _, remedy = str(error).partition(": ")
            raise UsageError(problem, remedy or "pass 2 <= window <= every") from None
        self._model, self._log, self._report_every = model, log, report_every
        self._layers = [layer for _, layer in batch_norm_layers(self._network)]
        self._hooks, self._first_step = ExitStack(), ExitStack()
        self._sampled: AbstractContextManager[None] | None = None  # a step that the monitor samples
        self._root_runs, self._depth = False, 0
        self._seen: set[str] = set()  # keys of the findings
        self._sampled_steps = 0
        self._told = False  # that no layer moves
        self.steps = 0
        """forwards in training mode so far"""
        self.health: Health | None = None
        """what the last report says; None: there was none yet"""
        self.findings: tuple[Finding, ...] = ()
        """all findings so far, each check's last one"""

    def __enter__(self) -> Self:
        others = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
        if others:  # their statistics are overwritten by those of process 0, or are as good as those
            return self
        self._depth = 0
        ends = self._model.register_forward_hook(_Hook(self._root_ends), always_call=True)
        self._hooks.callback(ends.remove)
        self._hooks.callback(self._model.register_forward_pre_hook(_Hook(self._root_begins)).remove)
        compiled = any(hasattr(module, "_orig_mod") for module in self._model.modules())
        if self._layers and not compiled:  # hooks on the layers would break up compiled code
            self._hooks.callback(self._layers[0].register_forward_pre_hook(_Hook(self._layer_begins)).remove)
            self._first_step.enter_context(_finding_relus(self._network, self._layers, self._monitor.rectified))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._hooks.close()
        self._first_step.close()
        self._end_step()
        if kind is None and self.steps:
            self.report()

    def report(self) -> Health:
        """What was measured since the last report. It is logged."""
        self._end_step()
        self.health = self._monitor.report()
        findings = self.health.findings()
        latest = {finding.id: finding for finding in (*self.findings, *findings)}
        self.findings = tuple(latest.values())
        new = [finding for finding in findings if finding.id not in self._seen]
        self._seen |= {finding.id for finding in new}
        for finding in new:
            if finding.severity != "info":
                LOG.warning("%s", finding)
        measured = not self._layers or any(layer.batches for layer in self.health.layers)
        if self._sampled_steps > 1 and not measured and not self._told:
            self._told = True
            LOG.warning(
                "nothing was measured of the normalisation layers, since no running statistics moved in the %d steps "
                "that were sampled: the layers are frozen, in evaluation mode, or have the momentum 0",
                self._sampled_steps,
            )
        if isinstance(self._log, SummaryWriter):
            for tag, value in self.health.tags().items():
                self._log.add_scalar(tag, value, self.steps)
            for finding in new:
                self._log.add_text("norm/findings", str(finding), self.steps)
        elif self._log is not None:
            self._log(self.steps, self.health)
        return self.health

    def _root_begins(self, *_: object) -> None:
        self._depth += 1
        if self._depth > 1:  # the forward of a LightningModule calls the module itself
            return
        if self._model.training:
            self._root_runs = True
            self._begin_step()
        else:
            self._end_step()

    def _root_ends(self, *_: object) -> None:
        self._depth -= 1

    def _layer_begins(self, layer: nn.Module, _: object) -> None:
        """A forward begins, in a model whose own forward is not what the loop calls."""
        if not self._root_runs and layer.training:
            self._begin_step()

    def _begin_step(self) -> None:
        self._end_step()
        if self.steps:
            self._first_step.close()
        if self.steps and self.steps % self._report_every == 0:
            self.report()
        if self._monitor.samples(self.steps):
            self._sampled_steps += 1
            self._sampled = self._monitor.step(self.steps)
            self._sampled.__enter__()
        self.steps += 1

    def _end_step(self) -> None:
        sampled, self._sampled = self._sampled, None
        if sampled is not None:
            sampled.__exit__(None, None, None)


def watch(
    model: nn.Module, *, log: Log | None = None, every: int = 64, window: int = 8, report_every: int = 512
) -> Watch:
    """Watch the batch normalisation of a model while your own loop trains it.

    >>> from bnlab import health
    >>> with health.watch(model, log=SummaryWriter("runs/mine")) as watched:
    ...     for images, labels in loader:
    ...         loss = F.cross_entropy(model(images), labels)
    ...         ...
    >>> watched.findings

    The buffers of the layers are read before and after a few forwards; nothing of the model, its gradients or its
    random numbers is changed, and no forward is added. Measured are, for each layer, the effective batch size (BN103),
    channels that a ReLU never passes (BN109), gammas near 0 (BN110) and what of the initial statistics is left. For
    what the statistics cost in accuracy, call `diagnose` with images.

    A step is a forward of the model in training mode; if the loop calls only parts of the model, one of its first
    normalisation layer. In a distributed training, process 0 measures. ReLUs that are modules are found, and those that
    are called as functions are not. Where a backward repeats the forward (activation checkpointing), layers count each
    batch twice, and the effective batch size is too small, by half at most.

    Args:
        model: any nn.Module; also compiled, or wrapped in DistributedDataParallel.
        log: a SummaryWriter of TensorBoard, or a function that takes the number of steps and a `Health`. Findings of
            severity warn also go to the logger "bnlab", once for each check.
        every: steps from one window to the next.
        window: steps that are measured in a window.
        report_every: steps from one report to the next; the last one is at the end of the context.

    Raises:
        TypeError: the model is not an nn.Module.
        UsageError: a number is out of range, or the model shows no layers since it is scripted.
    """
    return Watch(model, log=log, every=every, window=window, report_every=report_every)


class _Hook:
    """A hook that neither keeps its object alive nor is copied or saved with the module."""

    def __init__(self, method: Callable[..., object]) -> None:
        self._method = WeakMethod(method)

    def __call__(self, *arguments: object) -> None:
        method = self._method()
        if method is not None:
            method(*arguments)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _nothing

    def __reduce__(self) -> tuple[Any, ...]:
        return _hook_of_a_copy, ()


def _nothing(*_: object) -> None:
    """What a copy of the module has instead of the hook."""


def _hook_of_a_copy() -> Callable[..., None]:
    return _nothing


@contextmanager
def _finding_relus(network: nn.Module, layers: list[_BatchNorm], rectified: set[nn.Module]) -> Iterator[None]:
    """Within this context, the layers whose output is the input of a ReLU are added to `rectified`."""
    seen = _Relus(rectified)
    rectified.update(layer for layer in layers if any(isinstance(child, nn.ReLU) for child in layer.children()))
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(_Hook(seen.ran)).remove)
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                stack.callback(module.register_forward_pre_hook(_Hook(seen.begins)).remove)
        yield


class _Relus:
    def __init__(self, rectified: set[nn.Module]) -> None:
        self.rectified = rectified
        self.last: tuple[ReferenceType[Tensor], nn.Module] | None = None  # the last layer that ran, and its output

    def ran(self, layer: nn.Module, _: object, output: object) -> None:
        self.last = (ref(output), layer) if isinstance(output, Tensor) else None

    def begins(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.last is not None and inputs and self.last[0]() is inputs[0]:
            self.rectified.add(self.last[1])
