"""The networks: `build` makes one by name, `NETWORKS` lists them."""

from bnlab.nets.build import build
from bnlab.nets.catalogue import NETWORKS
from bnlab.nets.initialise import fit_to_data

__all__ = ["NETWORKS", "build", "fit_to_data"]
