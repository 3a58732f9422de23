"""Builds the four experts that `dare-ties.yaml` merges: those of studies/functional-dual-anchors, one seed, offline.

python studies/mergenetic/prepare.py            # in build/experts/ beside this file; once
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "functional-dual-anchors"))

import torch  # noqa: E402
from experts import Settings, build  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)  # as there: the bytes of the weights depend on the number
    out = HERE / "build" / "experts"
    print(f"{out}: {build(out, Settings()):.0f} s")
