"""Trace a forward once for each way in which it can run, so that what all its graphs show holds for every input.

A truth test on a traced value (`if x.shape[0] > 1:`) is traced both ways. Ways that end in an error which forward
raises itself do not count.
"""

import dis
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import Proxy, TraceError
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.norm.model_utils import copy_module
from bnlab.norm.own_forward import make_traceable

_MAX_TESTS, MAX_GRAPHS = 16, 32  # of one forward; each graph takes a trace


def first_sentence(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].partition(". ")[0]


class TracedValue(Proxy):
    """A traced value that rounding leaves a traced value."""

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self, digits), {})


class BranchingTracer(fx.Tracer):
    """Decides truth tests as `decided` says, and those after them with True."""

    def __init__(self, decided: tuple[bool, ...]) -> None:
        super().__init__()
        self.decided, self.taken = decided, list[bool]()

    def proxy(self, node: fx.Node) -> Proxy:
        return TracedValue(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        if len(self.taken) == _MAX_TESTS:
            raise TraceError(f"its forward has more than {_MAX_TESTS} truth tests")
        self.taken.append(self.decided[len(self.taken)] if len(self.taken) < len(self.decided) else True)
        return self.taken[-1]


def each_way(tracer: Callable[[tuple[bool, ...]], Any], trace: Callable[[Any], fx.Graph]) -> list[fx.Graph]:
    """Trace once for each combination of outcomes of the truth tests."""
    found: list[fx.Graph] = []
    refusals: list[Exception] = []
    pending: list[tuple[bool, ...]] = [()]
    while pending:
        decided = pending.pop()
        one = tracer(decided)
        try:
            found.append(trace(one))
        except Exception as error:
            if not _raised_by_forward(error, one.root):
                raise
            refusals.append(error)
        pending += [(*one.taken[:i], False) for i in range(len(decided), len(one.taken))]
        if len(found) + len(pending) > MAX_GRAPHS:
            raise TraceError(f"its forward has more than {MAX_GRAPHS} ways to run")
    if not found:
        raise refusals[0]
    return found


def _raised_by_forward(error: Exception, root: Any) -> bool:
    """Whether a `raise` or `assert` in a file with a class of the model raised it, not what proxies cannot do."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or isinstance(error, (TraceError, TypeError)):
        return False
    file = last.tb_frame.f_globals.get("__name__", "")
    known = {kind.__module__ for module in root.modules() for kind in type(module).__mro__}
    own = file in known and (not file.startswith("torch.") or file == _BatchNorm.__module__)
    return own and dis.opname[last.tb_frame.f_code.co_code[last.tb_lasti]].startswith("RAISE")


# The graph of one module's own forward, in which the modules that it calls are single nodes.


class _OwnTracer(BranchingTracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def own_graphs(module: nn.Module) -> list[fx.Graph]:
    """Trace a module's own forward, once for each way in which its truth tests turn out.

    Raises:
        Exception: of any type, when it cannot be traced.
    """
    if "forward" in vars(module):
        raise TraceError("its forward was replaced")
    shared = [*module.parameters(), *module.buffers(), *module.children()]

    def trace(tracer: _OwnTracer) -> fx.Graph:
        scratch = copy_module(module, shared)
        make_traceable(scratch)
        return tracer.trace(scratch)

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return each_way(_OwnTracer, trace)
