"""Loading the scripts of `studies/`, which are no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

STUDIES = Path(__file__).parents[1] / "studies"


def load_script(place: str) -> ModuleType:
    """The module in `studies/PLACE`, under its own name, by which its dataclasses look themselves up."""
    path = STUDIES / place
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
