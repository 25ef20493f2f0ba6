"""Runs a copy of the network in other ways on a few images: memory formats, half precision, compilers, ONNX."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bnlab.errors import UsageError, did_you_mean
from bnlab.health.batches import Batch
from bnlab.health.evidence import Evidence
from bnlab.health.gather.parity import (
    CLOSE,
    IMAGES,
    Parity,
    as_type,
    compare,
    difference,
    layer_inputs,
    mapped,
    most_different,
    outputs,
    within,
)
from bnlab.health.subject import Subject
from bnlab.norm.model_utils import copy_module
from bnlab.norm.recalibrate import evaluation_mode

HALF_CLOSE = 0.25  # of the outputs' standard deviation, in half precision
_HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
_Model = Callable[..., Any]


def _channels_last(copied: nn.Module, batch: Batch) -> _Model:
    return copied.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def _compile(copied: nn.Module, batch: Batch) -> _Model:
    compiled: _Model = torch.compile(copied)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("default"):  # elsewhere in a diagnosis, nothing is compiled
            return compiled(*args, **kwargs)

    return run


def _trace(copied: nn.Module, batch: Batch) -> _Model:
    inputs: dict[str, Any] = {"example_kwarg_inputs": dict(batch.kwargs)} if batch.kwargs else {}
    traced: _Model = torch.jit.trace(  # type: ignore[no-untyped-call]
        copied, None if batch.kwargs else batch.args, check_trace=False, **inputs
    )
    return traced


def _script(copied: nn.Module, batch: Batch) -> _Model:
    scripted: _Model = torch.jit.script(copied)
    return scripted


def _onnx(copied: nn.Module, batch: Batch) -> _Model:
    import onnxruntime  # type: ignore[import-not-found,unused-ignore]  # noqa: F401  # the exported program runs in it

    program = torch.onnx.export(copied, batch.args, kwargs=dict(batch.kwargs), dynamo=True, verbose=False)
    assert program is not None

    def run(*args: Any, **kwargs: Any) -> Any:
        found = program(*args, **kwargs)
        return found[0] if len(found) == 1 else tuple(found)

    return run


_WAYS: dict[str, Callable[[nn.Module, Batch], _Model]] = {
    "channels_last": _channels_last,
    **{name: lambda copied, batch, dtype=dtype: copied.to(dtype) for name, dtype in _HALF.items()},  # type: ignore[misc]
    "compile": _compile,
    "trace": _trace,
    "script": _script,
    "onnx": _onnx,
}


def check_backends(names: Iterable[str]) -> None:
    """Refuse unknown names.

    Raises:
        UsageError: there is no such backend.
    """
    if isinstance(names, str):
        raise UsageError(f"backends is '{names}', one name", "pass a sequence of names")
    for name in names:
        if name not in _WAYS:
            raise UsageError(f"there is no backend '{name}'", did_you_mean(name, [*_WAYS]))


def gather(subject: Subject, evidence: Evidence) -> dict[str, Any]:
    """Run a few images in each way that the caller wants, and in the plain one."""
    if not evidence.layers:
        return {}
    batch = subject.batches.sample(IMAGES)
    ways = [way for way in subject.given.backends if way != "channels_last" or batch.images.ndim == 4]
    if not ways:
        return {}
    found: list[Parity] = []
    with evaluation_mode(subject.network), torch.no_grad():
        try:
            plain = outputs(subject, batch, subject.network)
        except Exception as error:  # of any type: it is the caller's own code
            subject.notes.append(f"other backends were not tried, since {len(batch)} images fail ({_kind(error)})")
            return {}
        for way in ways:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of conversion, which are for those who convert
                    found.append(_measure(subject, batch, plain, way))
            except Exception as error:  # of any type: of the caller's code, torch or a package that is not installed
                subject.notes.append(f"{way} was not checked, since the model does not run in it ({_kind(error)})")
    return {"backends": tuple(found)} if found else {}


def _measure(subject: Subject, batch: Batch, plain: list[Tensor], way: str) -> Parity:
    copied = copy_module(subject.network)
    model = _WAYS[way](copied, batch)
    given = _converted(batch, way)
    other = outputs(subject, given, model)
    tolerance = None
    if way in _HALF:
        off = difference(other, plain)
        tolerance = HALF_CLOSE if off <= HALF_CLOSE else within(_rounding(subject, batch, plain, way), HALF_CLOSE)
    parity = compare(subject, batch, plain, other, way, tolerance)
    if not (parity.differs and plain) or not (way == "channels_last" or way in _HALF):
        return parity
    worst = most_different(other, plain)
    first = _first_layer(
        subject, copied, batch.first(1, worst), given.first(1, worst), HALF_CLOSE if tolerance else CLOSE
    )
    return replace(parity, first_layer=first)


def _converted(batch: Batch, way: str) -> Batch:
    if way in _HALF:
        return as_type(batch, _HALF[way])
    if way == "channels_last":
        return mapped(batch, lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x)
    return batch


def _rounding(subject: Subject, batch: Batch, plain: list[Tensor], way: str) -> float:
    """What the outputs change by in float32 if only the weights and images are rounded to half precision."""
    dtype, copied = _HALF[way], copy_module(subject.network)
    for parameter in copied.parameters():
        parameter.copy_(parameter.to(dtype))
    rounded = mapped(batch, lambda x: x.to(dtype).to(x.dtype) if x.is_floating_point() else x)
    return difference(outputs(subject, rounded, copied), plain)


def _first_layer(subject: Subject, copied: nn.Module, batch: Batch, given: Batch, close: float) -> str | None:
    layers = subject.layers
    plain = layer_inputs(subject.network, layers, lambda: subject.call(batch))
    other = layer_inputs(copied, layers, lambda: subject.call(given, copied))
    return next(
        (name for name, x in plain.items() if name in other and not difference([other[name]], [x]) <= close), None
    )


def _kind(error: Exception) -> str:
    return type(error).__name__
