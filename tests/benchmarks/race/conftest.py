"""Keeps Ray out of the unit tests: looking for doctests would import it."""

collect_ignore = ["tune_rivals.py"]
