"""Networks as tables: `build` makes one by name, `NETWORKS` lists them."""

from bnlab.nets.build import NETWORKS, build

__all__ = ["NETWORKS", "build"]
