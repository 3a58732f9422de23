"""Finding the merges: the main path is `search/study.py`."""

__version__ = "0.1.0"
