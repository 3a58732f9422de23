"""A merge method and all coefficients."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Recipe:
    """A merge method and all coefficients: all that distinguishes one merge of a study's parents from another."""

    method: str
    coefficients: Mapping[str, float]

    @cached_property
    def key(self) -> str:
        """SHA-256 of method and coefficients: equal recipes have equal keys."""
        text = json.dumps([self.method, sorted(self.coefficients.items())])
        return hashlib.sha256(text.encode()).hexdigest()
