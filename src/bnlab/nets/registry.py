"""The networks there are, by name: which tables each has, and how it is meant to be built."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bnlab.errors import UsageError, did_you_mean, printable
from bnlab.nets import tables
from bnlab.nets.tables import Table

Stem = Callable[[Table], Table]
WIDEST = 16  # times a table's own width
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
"""the arguments of `build`, and keys of a recipe, that say what a trained network computes: its weights go with them"""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network of the catalogue; its fields are the defaults of `build`."""

    summary: str
    variants: Mapping[str, Table]
    """the first is the default"""
    norm: str
    activation: str = "relu"
    dropout: float = 0.0
    stems: Mapping[str, Stem]
    """first layers other than the table's own"""

    @property
    def default_variant(self) -> str:
        """The first."""
        return next(iter(self.variants))


_GOOGLENETS = {
    "double": tables.googlenet(),
    "5x5": tables.googlenet(kernels=(5,)),
    "torchvision": tables.googlenet(kernels=(3,), last_pool=2),
}
_INCEPTIONS = {"literal": tables.inception(projection=128), "corrected": tables.inception(projection=96)}
_SMALL = {"table": tables.SMALL_INCEPTION}
_MLP = {"table": tables.MLP}
_STEMS: Mapping[str, Stem] = {"separable": tables.separable_stem, "small": tables.small_stem}

CATALOGUE: Mapping[str, Network] = {
    "bn_googlenet": Network(summary="GoogLeNet with BN", variants=_GOOGLENETS, norm="batch", dropout=0.2, stems=_STEMS),
    "googlenet": Network(
        summary="GoogLeNet (Szegedy et al. 2015)", variants=_GOOGLENETS, norm="none", dropout=0.2, stems=_STEMS
    ),
    "bn_inception": Network(
        summary="BN-Inception, the BN paper's network (Fig. 5)", variants=_INCEPTIONS, norm="batch", stems=_STEMS
    ),
    "inception": Network(
        summary="the paper's baseline: no BN, dropout 0.4",
        variants=_INCEPTIONS,
        norm="none",
        dropout=0.4,
        stems=_STEMS,
    ),
    "bn_small_inception": Network(
        summary="small Inception for 32 px, with BN",
        variants=_SMALL,
        norm="batch",
        dropout=0.2,
        stems={},
    ),
    "small_inception": Network(
        summary="small Inception for 32 px", variants=_SMALL, norm="none", dropout=0.2, stems={}
    ),
    "bn_mlp": Network(
        summary="3 x 100 sigmoid units with BN (sec. 4.1)",
        variants=_MLP,
        norm="batch",
        activation="sigmoid",
        stems={},
    ),
    "mlp": Network(
        summary="3 x 100 sigmoid units, on 28 x 28 pixels",
        variants=_MLP,
        norm="none",
        activation="sigmoid",
        stems={},
    ),
}
NETWORKS: tuple[str, ...] = tuple(CATALOGUE)


def find(name: str) -> Network:
    """The network of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in CATALOGUE:
        raise UsageError(f"no network is called '{printable(name)}'", did_you_mean(str(name), list(CATALOGUE)))
    return CATALOGUE[name]


def table_of(name: str, *, variant: str, stem: str | None, width: float) -> Table:
    """The table of a network's variant, with another stem and width where asked for.

    Raises:
        UsageError: there is no such network, or it has no such variant or stem, or the width is out of range.
    """
    network = find(name)
    if variant not in network.variants:
        raise UsageError(
            f"{name} has no variant '{printable(str(variant))}'", did_you_mean(str(variant), list(network.variants))
        )
    table = network.variants[variant]
    if stem is not None:
        if stem not in network.stems:
            known = did_you_mean(str(stem), list(network.stems)) if network.stems else "leave it out"
            raise UsageError(f"{name} has no stem '{printable(str(stem))}' beside its table's own", known)
        table = network.stems[stem](table)
    if not 0 < width <= WIDEST:
        raise UsageError(f"width {width} cannot be", f"it is a factor, above 0 and up to {WIDEST}")
    return tables.widened(table, width)


def has_row(name: str, kind: type[tables.Row]) -> bool:
    """Whether the network's tables have a row of that kind, such as one for auxiliary heads."""
    network = find(name)
    return any(isinstance(row, kind) for row in network.variants[network.default_variant])
