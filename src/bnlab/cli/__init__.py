"""The command line: each verb parses its options, calls a command, and shows the result."""

from bnlab.cli import classifiers, doctor, tools  # each adds its verbs, in this order
from bnlab.cli.app import app

__all__ = ["app", "classifiers", "doctor", "tools"]
