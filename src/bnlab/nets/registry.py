"""The networks by name: the tables of each, and the options that it is built with unless others are given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bnlab.nets import tables
from bnlab.nets.options import check_name
from bnlab.nets.tables import Table

ARCHITECTURE_KEYS = (
    "variant",
    "norm",
    "norm_eps",
    "norm_momentum",
    "activation",
    "placement",
    "conv_bias",
    "width",
    "stem",
    "local_response",
)
"""Arguments of `build`, and keys of a recipe, that decide what a network computes with given weights."""


@dataclass(frozen=True)
class NetworkSpec:
    """A network of the registry. `norm`, `activation` and `dropout` are the defaults of `build`."""

    summary: str
    variants: Mapping[str, Table]  # The first is the default.
    norm: str
    activation: str = "relu"
    dropout: float = 0.0
    stems: Mapping[str, Callable[[Table], Table]] = field(default_factory=dict)
    """First layers that can replace the table's own."""


_GOOGLENET = {
    "double": tables.googlenet(),
    "5x5": tables.googlenet(kernels=(5,)),
    "torchvision": tables.googlenet(kernels=(3,), last_pool=2),
}
_INCEPTION = {"literal": tables.inception(projection=128), "corrected": tables.inception(projection=96)}
_SMALL = {"table": tables.SMALL_INCEPTION}
_MLP = {"table": tables.MLP}
_STEMS = {"separable": tables.separable_stem, "small": tables.small_stem}

# fmt: off
NETWORKS: Mapping[str, NetworkSpec] = {
    "bn_googlenet": NetworkSpec("GoogLeNet with BN", _GOOGLENET, "batch", dropout=0.2, stems=_STEMS),
    "googlenet": NetworkSpec("GoogLeNet (Szegedy et al. 2015)", _GOOGLENET, "none", dropout=0.2, stems=_STEMS),
    "bn_inception": NetworkSpec("BN-Inception, the BN paper's network (Fig. 5)", _INCEPTION, "batch", stems=_STEMS),
    "inception": NetworkSpec("the paper's baseline: no BN, dropout 0.4", _INCEPTION, "none", dropout=0.4, stems=_STEMS),
    "bn_small_inception": NetworkSpec("small Inception for 32 px, with BN", _SMALL, "batch", dropout=0.2),
    "small_inception": NetworkSpec("small Inception for 32 px", _SMALL, "none", dropout=0.2),
    "bn_mlp": NetworkSpec("3 x 100 sigmoid units with BN (sec. 4.1)", _MLP, "batch", "sigmoid"),
    "mlp": NetworkSpec("3 x 100 sigmoid units, on 28 x 28 pixels", _MLP, "none", "sigmoid"),
}
# fmt: on


def find(name: str) -> NetworkSpec:
    """The network with that name; UsageError if there is no such network."""
    check_name("network", name, NETWORKS)
    return NETWORKS[name]


def has_row(name: str, kind: type[tables.Row]) -> bool:
    """Whether the tables of the network with that name have a row of that kind, such as `Auxiliary`."""
    return any(isinstance(row, kind) for table in find(name).variants.values() for row in table)
