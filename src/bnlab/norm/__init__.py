"""Batch normalisation itself: what the paper describes, on torch alone; of use without the rest of bnlab."""

from bnlab.norm import reference
from bnlab.norm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "reference"]
