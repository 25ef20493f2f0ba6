"""Compare the outputs of a folded model with those of the model itself, for an example.

Folding changes how values are rounded, which in half precision is much. Where the outputs differ, both models are held
against the model in float64: folding must not make the outputs much worse than rounding did before.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bnlab.norm.model_utils import copy_module

_CLOSE = 1e-3  # of the outputs' standard deviation
_WORSE = 4.0  # how many times the error of the model itself that of the folded one may be
_FEW_ROUNDINGS = 16  # an error of so many roundings counts as none: in few outputs it is chance
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
    """Compare the outputs; return the module of this `kind` that got another number of dimensions, with the number.

    `fold` folds the model in another precision, which shows whether rounding explains a difference.

    Raises:
        ValueError: the outputs differ.
    """
    model = copy_module(model).eval()
    plain = _tensors(run(model, arguments))
    others: dict[str, int] = {}

    def note(module: Any, inputs: tuple[Any, ...], more: dict[str, Any]) -> None:
        dims = [*inputs, *more.values()][0].dim()
        if dims != module.dims:
            others[module.name] = dims
            raise _OtherDimensions

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in folded.modules() if isinstance(m, kind)]
    try:
        found = _tensors(run(folded, arguments))
    except _OtherDimensions:
        return others
    finally:
        for hook in hooks:
            hook.remove()
    offs = [_off(a, b) for a, b in zip(found, plain, strict=False)]
    if len(found) != len(plain):
        offs.append(math.inf)
    if all(off <= _CLOSE for off in offs):
        return {}
    types = {t.dtype for t in [*model.parameters(), *plain] if t.is_floating_point()}
    wide, exact, width = _in_higher_precision(model, arguments)
    if exact is None or types <= {width} or not len(found) == len(plain) == len(exact):
        if exact is None and all(off <= _FEW_ROUNDINGS * max(torch.finfo(t).eps for t in types) for off in offs):
            return {}
        raise ValueError(
            f"the folded model's output differs by {max(offs):.2g} of its standard deviation: "
            "the model does what its graph does not show, so it cannot be folded"
        )
    fold(wide, _as_type(arguments, width))  # raises where rounding is not the reason
    real = [(a, b, right) for a, b, right in zip(found, plain, exact, strict=True) if a.is_floating_point()]
    off = max((_off(a, right, where=b) for a, b, right in real), default=0.0)
    own = max((_off(b, right, where=b) for a, b, right in real), default=0.0)
    rounding = _FEW_ROUNDINGS * max(torch.finfo(kind).eps for kind in types)
    if off > max(_CLOSE, _WORSE * own, rounding) and own <= _NOISE:
        low = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
        raise ValueError(
            f"in {low} the folded model's output is off by {off:.2g} of its standard deviation, and the model's by "
            f"{own:.2g}: fold the model in float32, or use it as it is"
        )
    return {}


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


def _in_higher_precision(
    model: nn.Module, arguments: tuple[Any, ...]
) -> tuple[nn.Module, list[Tensor] | None, torch.dtype]:
    """Return the model in float64, or else in float32, its outputs, and the type; None where it runs in neither."""
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    for width in (torch.float64, torch.float32):
        try:
            wide = copy_module(model).to(width)
            with torch.autocast(device, enabled=False):
                return wide, _tensors(run(wide, _as_type(arguments, width))), width
        except Exception:  # of any type: a model may ask for another type, or the device may lack this one
            continue
    return model, None, torch.float64


def _as_type(arguments: tuple[Any, ...], width: torch.dtype) -> tuple[Any, ...]:
    def one(value: Any) -> Any:
        return value.to(width) if isinstance(value, Tensor) and value.is_floating_point() else value

    converted: tuple[Any, ...] = tree_map(one, arguments)
    return converted


def _tensors(output: Any, objects: int = 2) -> list[Tensor]:
    """Return the tensors and numbers in an output, within tuples, dictionaries and, so many deep, other objects."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf.to_dense() if leaf.layout != torch.strided else leaf)
        elif isinstance(leaf, (int, float, complex)):
            found.append(torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None))
        elif objects and hasattr(leaf, "__dict__") and not isinstance(leaf, (nn.Module, type)):
            found += _tensors(list(vars(leaf).values()), objects - 1)
    return found


def _gpus(model: nn.Module) -> list[int]:
    return sorted({t.device.index or 0 for t in model.parameters() if t.device.type == "cuda"})
