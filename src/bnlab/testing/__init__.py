"""Checks of batch normalisation as assertions, for the tests of other projects: of a layer, and of a network.

>>> from bnlab import testing
>>> testing.check_norm_layer(torch.nn.BatchNorm2d(8))
"""

from bnlab.testing.network import check_network
from bnlab.testing.norm_layer import NormLayerCheck, check_norm_layer, norm_layer_checks

__all__ = ["NormLayerCheck", "check_network", "check_norm_layer", "norm_layer_checks"]
