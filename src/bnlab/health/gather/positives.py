"""Counts the positive outputs of channels that look dead by their gamma and beta."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnlab.health.evidence import Floats


@contextmanager
def counting(
    layers: Mapping[str, nn.Module], positives: Mapping[str, Floats], when: Callable[[], bool]
) -> Iterator[None]:
    """Within this context, each forward for which `when` is true adds to `positives` (by layer, C) how many outputs of
    each channel are not at most 0, so that NaN counts. Channels that are NaN in `positives` are left out.
    """

    def hook(name: str, output: Any) -> None:
        if when() and isinstance(output, Tensor) and output.ndim > 1:
            channels = np.flatnonzero(~np.isnan(positives[name]))
            some = output.detach().index_select(1, torch.as_tensor(channels, device=output.device))
            found = (~(some <= 0)).transpose(0, 1).flatten(1).sum(1)
            positives[name][channels] += found.cpu().numpy()

    with ExitStack() as stack:
        for name in positives:
            handle = layers[name].register_forward_hook(lambda module, args, output, name=name: hook(name, output))
            stack.callback(handle.remove)
        yield
