"""The command line: each verb parses, calls a command, and shows what it came to."""

from bnlab.cli import classifiers, machines, networks, studies  # each adds its verbs, in this order
from bnlab.cli.app import app

__all__ = ["app", "classifiers", "machines", "networks", "studies"]
