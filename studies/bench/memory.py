"""Peak memory of a running study and of an export: anonymous pages only, since the parents' pages belong to files."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

MIB = 2**20
POLL_SECONDS = 0.01


def peak(command: Sequence[str], folder: Path) -> int:
    """Runs `mergefront` with these arguments; the largest `RssAnon` + `RssShmem` seen, in bytes. Linux only.

    Raises:
        RuntimeError: the command failed; its last line is the message.
    """
    with (folder / "output.txt").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "search.cli.main", *command], stdout=output, stderr=output
        )
        largest = 0
        while process.poll() is None:
            largest = max(largest, _resident(process.pid))
            time.sleep(POLL_SECONDS)
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(f"{' '.join(command)}: {output.read().strip().splitlines()[-1]}")
    return largest


def _resident(pid: int) -> int:
    """Bytes of private and shared memory without pages of files; 0 once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem") if name in fields)
