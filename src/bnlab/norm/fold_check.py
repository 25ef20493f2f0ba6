"""Compare the outputs of a folded model with those of the model itself, for an example.

Folding changes how values are rounded, which in half precision is much. Where the outputs differ, both models are held
against the model in float64: folding must not make the outputs much worse than rounding did before.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_CLOSE = 1e-3  # of the outputs' standard deviation
_WORSE = 4.0  # how many times the error of the model itself that of the folded one may be
_NOISE = 0.5  # of the outputs' standard deviation: an error that leaves nothing to compare


class _OtherDimensions(Exception):  # noqa: N818  # internal: it ends a run
    pass


@torch.no_grad()
def run(model: nn.Module, arguments: tuple[Any, ...]) -> Any:
    """Return the outputs for copies of the arguments, always with the same random numbers."""
    given = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, arguments)
    with torch.random.fork_rng(devices=_gpus(model)):
        torch.manual_seed(0)
        return model(*given)


def check_outputs(
    model: nn.Module,
    folded: nn.Module,
    arguments: tuple[Any, ...],
    kind: type[nn.Module],
    fold: Callable[[nn.Module, tuple[Any, ...]], Any],
) -> dict[str, int]:
    """Compare the outputs; return the modules of this `kind` that got another number of dimensions, with the number.

    `fold` folds the model in float64, which shows whether rounding explains a difference.

    Raises:
        ValueError: the outputs differ.
    """
    model = copy.deepcopy(model).eval()
    plain = _tensors(run(model, arguments))
    others: dict[str, int] = {}

    def note(module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs[0].dim() != module.dims:
            others[module.name] = inputs[0].dim()
            raise _OtherDimensions

    watched = copy.deepcopy(folded)
    for module in watched.modules():
        if isinstance(module, kind):
            module.register_forward_pre_hook(note)
    try:
        found = _tensors(run(watched, arguments))
    except _OtherDimensions:
        return others
    if len(found) == len(plain) and all(_off(a, b) <= _CLOSE for a, b in zip(found, plain, strict=True)):
        return {}
    double, exact = _in_float64(model, arguments)
    types = {tensor.dtype for tensor in [*model.parameters(), *plain] if tensor.is_floating_point()}
    if exact is None or not types - {torch.float64} or len(found) != len(plain):
        _refuse(found, plain)
    worst, own = 0.0, 0.0
    for a, b, right in zip(found, plain, exact, strict=True):
        if _off(a, b) <= _CLOSE:
            continue
        off, own_off = _off(a, right, where=b), _off(b, right, where=b)
        if not off <= _WORSE * own_off or own_off > _NOISE or not a.is_floating_point():
            worst, own = (off, own_off) if not off <= worst else (worst, own)
            worst = worst or off or math.inf
    if worst:
        fold(double, _double(arguments))  # raises where rounding is not the reason
        if own <= _NOISE and any(a.is_floating_point() for a in plain):
            low = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
            raise ValueError(
                f"in {low} the folded model's output is off by {worst:.2g} of its standard deviation, and the model's "
                f"by {own:.2g}: fold the model in float32, or use it as it is"
            )
    return {}


def _refuse(found: list[Tensor], plain: list[Tensor]) -> None:
    offs = [_off(a, b) for a, b in zip(found, plain, strict=False)]
    off = max((off for off in offs if not off <= _CLOSE), default=math.inf)
    raise ValueError(
        f"the folded model's output differs by {off:.2g} of its standard deviation: "
        "the model does what its graph does not show, so it cannot be folded"
    )


def _off(found: Tensor, expected: Tensor, where: Tensor | None = None) -> float:
    """Return the largest difference in standard deviations of what is expected, in float64.

    Values that are not finite must be the same. With `where`, only the finite values of that tensor are compared.
    """
    if found.shape != expected.shape:
        return math.inf
    if not expected.is_floating_point() and not expected.is_complex():  # the fraction that differs
        return float((found != expected).double().mean()) if expected.numel() else 0.0
    a, b = (_real(value) for value in (found, expected))
    both = torch.isfinite(b) if where is None else torch.isfinite(_real(where))
    same = (a == b) | (a.isnan() & b.isnan())
    if bool((~both & ~same).any()) and where is None:
        return math.inf
    a, b = a[both], b[both]
    if not a.numel():
        return 0.0
    spread = float(b.std(correction=0))
    scale = spread if spread > 1e-12 * float(b.abs().max()) else float(b.abs().max()) or 1.0  # constant outputs
    off = float((a - b).abs().max()) / scale
    return off if math.isfinite(off) else math.inf


def _real(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return torch.view_as_real(value).double() if value.is_complex() else value.double()


def _in_float64(model: nn.Module, arguments: tuple[Any, ...]) -> tuple[nn.Module, list[Tensor] | None]:
    """Return the model in float64, and its outputs if it can run so."""
    double = copy.deepcopy(model)
    try:
        double = double.double()
        devices = {tensor.device.type for tensor in double.parameters()} or {"cpu"}
        with torch.autocast(next(iter(devices)), enabled=False):
            return double, _tensors(run(double, _double(arguments)))
    except Exception:  # of any type: a model may ask for another type, or the device may lack this one
        return double, None


def _double(arguments: Any) -> Any:
    def one(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(one, arguments)


def _tensors(output: Any) -> list[Tensor]:
    """Return the tensors and numbers in an output, within tuples, dictionaries and other objects."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf.to_dense() if leaf.layout != torch.strided else leaf)
        elif isinstance(leaf, (int, float, complex)):
            found.append(torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += _tensors([getattr(leaf, field.name) for field in fields(leaf)])
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += _tensors([value for value in vars(leaf).values() if value is not leaf])
    return found


def _gpus(model: nn.Module) -> list[int]:
    return sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
