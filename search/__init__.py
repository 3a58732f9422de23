"""Finding the merges: the main path is `search/study.py`."""

from __future__ import annotations

__version__ = "0.1.0"
