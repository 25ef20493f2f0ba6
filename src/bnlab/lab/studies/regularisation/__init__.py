"""The study of regularisation: `study.py` measures and assesses it, the other files are what it alone needs."""

from bnlab.lab.studies.regularisation.study import STUDY

__all__ = ["STUDY"]
