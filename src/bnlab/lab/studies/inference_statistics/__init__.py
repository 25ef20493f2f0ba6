"""The study of inference statistics: `study.py` measures and assesses it, the other files are what it alone needs."""

from bnlab.lab.studies.inference_statistics.study import STUDY

__all__ = ["STUDY"]
