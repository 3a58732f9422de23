"""Locks over processes: what one holds another does not get, and the system gives back what a dead one held."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from search.database import reserved

HOLDER = """
import sys
from search.database import reserved
with reserved(sys.argv[1], sys.argv[2]) as mine:
    print(mine, flush=True)
    sys.stdin.read()
"""


def test_a_name_is_reserved_by_one_process_until_it_dies(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'not' / 'yet' / 'study.db'}"
    command = [sys.executable, "-c", HOLDER, url, "one"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "True\n"
        with reserved(url, "one") as mine:
            assert not mine
        with reserved(url, "another") as mine:
            assert mine
        with reserved(url, "one") as mine:
            assert not mine, "what this process let go of was not the other's"
        holder.kill()
    for _ in range(2):
        with reserved(url, "one") as mine:
            assert mine
