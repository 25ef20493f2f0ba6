"""Merge what several processes of one training saved into one state_dict, statistics included.

Without synchronised layers, each process keeps the running statistics of its own images. The mean of all images is the
mean of the processes' means. Their variance is the mean of the variances plus the variance of the means: averaging the
variances alone leaves out how far the means are apart (Chan, Golub & LeVeque 1979).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnlab.norm.moments import merge_statistics

_VARIANCES = ("running_var", "running_covariance")


def merge_ranks(states: Sequence[Mapping[str, Any]], images: Sequence[float] | None = None) -> dict[str, Any]:
    """Return one state_dict of those that the processes of a training saved.

    Means and variances of normalisation layers are merged; all else is that of the first state_dict, which the
    processes have in common.

    Args:
        states: one state_dict for each process, of the same model.
        images: how many images each process had (default: equally many).

    Raises:
        ValueError: there are fewer than two state_dicts, they do not fit each other, or `images` do not fit them.
    """
    if isinstance(states, Mapping) or len(states) < 2:
        raise ValueError("pass a list of two or more state_dicts, one for each process")
    if images is not None and (len(images) != len(states) or not min(images) >= 0 or not 0 < sum(images) < torch.inf):
        raise ValueError(f"images has to give a number for each of the {len(states)} state_dicts")
    weights = torch.ones(len(states)) if images is None else torch.tensor(images, dtype=torch.float64)
    merged = dict(states[0])
    for number, state in enumerate(states[1:], 1):
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):  # what a module keeps in its extra state
                continue
            if name not in merged or merged[name].shape != tensor.shape:
                raise ValueError(f"the tensor {name} of state_dict {number} is not in the first one with its shape")
        if missing := [name for name in merged if name not in state]:
            raise ValueError(f"state_dict {number} lacks the tensor {missing[0]}")
    for name, first in states[0].items():
        layer, _, last = name.rpartition(".")
        mean_name = f"{layer}.running_mean" if layer else "running_mean"
        if last not in _VARIANCES or mean_name not in merged:
            continue
        means, variances = (
            torch.stack([state[key].detach().cpu() for state in states]) for key in (mean_name, name)
        )  # P x C; P x C or P x groups x D x D
        mean, variance = merge_statistics(means, variances, weights)
        merged[mean_name], merged[name] = mean.to(states[0][mean_name]), variance.to(first)
    return merged
