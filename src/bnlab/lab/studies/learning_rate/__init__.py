"""The study of learning rate: `study.py` measures and assesses it, the other files are what it alone needs."""

from bnlab.lab.studies.learning_rate.study import STUDY

__all__ = ["STUDY"]
