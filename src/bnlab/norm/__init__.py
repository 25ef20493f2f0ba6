"""Batch normalisation itself: what the paper describes, on torch alone, for use without the rest of bnlab."""

from bnlab.norm import reference
from bnlab.norm.accumulate import accumulate
from bnlab.norm.convert import Conversion, convert, convert_sync, revert, revert_sync
from bnlab.norm.folding.fold import Folding, fold
from bnlab.norm.freeze import Freezing, freeze, unfreeze
from bnlab.norm.ghost import GhostBatchNorm1d, GhostBatchNorm2d
from bnlab.norm.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, TooFewValuesError
from bnlab.norm.merge_ranks import merge_ranks
from bnlab.norm.norm_activation import NormActivation
from bnlab.norm.recalibrate import MeasuredLayer, NotFiniteError, Recalibration, recalibrate
from bnlab.norm.save_memory import save_memory
from bnlab.norm.sync import SyncBatchNorm
from bnlab.norm.whitening import Whitening1d, Whitening2d

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conversion",
    "Folding",
    "Freezing",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "MeasuredLayer",
    "NormActivation",
    "NotFiniteError",
    "Recalibration",
    "SyncBatchNorm",
    "TooFewValuesError",
    "Whitening1d",
    "Whitening2d",
    "accumulate",
    "convert",
    "convert_sync",
    "fold",
    "freeze",
    "merge_ranks",
    "recalibrate",
    "reference",
    "revert",
    "revert_sync",
    "save_memory",
    "unfreeze",
]
