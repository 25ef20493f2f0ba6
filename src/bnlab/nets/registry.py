"""The networks by name: the tables of each, and the options that it is built with unless others are given."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.nets import tables
from bnlab.nets.tables import Table

Stem = Callable[[Table], Table]

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
    variants: Mapping[str, Table]
    """The first is the default."""
    norm: str
    activation: str = "relu"
    dropout: float = 0.0
    stems: Mapping[str, Stem] = field(default_factory=dict)
    """First layers that can replace the table's own."""

    @property
    def default_variant(self) -> str:
        return next(iter(self.variants))


_GOOGLENET = {
    "double": tables.googlenet(),
    "5x5": tables.googlenet(kernels=(5,)),
    "torchvision": tables.googlenet(kernels=(3,), last_pool=2),
}
_INCEPTION = {"literal": tables.inception(projection=128), "corrected": tables.inception(projection=96)}
_SMALL = {"table": tables.SMALL_INCEPTION}
_MLP = {"table": tables.MLP}
_STEMS: Mapping[str, Stem] = {"separable": tables.separable_stem, "small": tables.small_stem}

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
    """The network with that name.

    Raises:
        UsageError: no network has that name.
    """
    if name not in NETWORKS:
        raise UsageError(f"no network is called '{printable(name)}'", did_you_mean(str(name), list(NETWORKS)))
    return NETWORKS[name]


def table_of(name: str, *, variant: str, stem: str | None, width: float) -> Table:
    """The table of a network's variant, with another stem and width if they are given.

    Raises:
        UsageError: no network has that name, or it has no such variant or stem.
    """
    spec = find(name)
    if variant not in spec.variants:
        raise UsageError(f"{name} has no variant '{printable(variant)}'", did_you_mean(variant, list(spec.variants)))
    table = spec.variants[variant]
    if stem is not None:
        if stem not in spec.stems:
            remedy = did_you_mean(stem, list(spec.stems)) if spec.stems else "leave stem out"
            raise UsageError(f"{name} has no stem '{printable(stem)}' to replace its table's own", remedy)
        table = spec.stems[stem](table)
    return tables.widen(table, width)


def has_row(name: str, kind: type[tables.Row]) -> bool:
    """Whether the network's tables have a row of that kind, such as `Auxiliary`.

    Raises:
        UsageError: no network has that name.
    """
    spec = find(name)
    return any(isinstance(row, kind) for row in spec.variants[spec.default_variant])
