"""The study of bias: `study.py` measures and assesses it, the other files are what it alone needs."""

from bnlab.lab.studies.bias.study import STUDY

__all__ = ["STUDY"]
