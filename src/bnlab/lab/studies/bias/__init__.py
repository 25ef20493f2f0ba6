"""The study itself is in `study.py`; the other files are helpers that it alone uses."""

from bnlab.lab.studies.bias.study import STUDY as STUDY
