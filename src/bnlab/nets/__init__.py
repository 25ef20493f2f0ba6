"""The networks: `build` makes one by name, `NETWORKS` lists them."""

from bnlab.nets.build import build
from bnlab.nets.initialise import lsuv_init
from bnlab.nets.registry import NETWORKS

__all__ = ["NETWORKS", "build", "lsuv_init"]
