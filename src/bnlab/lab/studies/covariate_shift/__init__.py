"""The study of covariate shift: `study.py` measures and assesses it, the other files are what it alone needs."""

from bnlab.lab.studies.covariate_shift.study import STUDY

__all__ = ["STUDY"]
