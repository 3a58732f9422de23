"""What runs on a Ray cluster's machines: an actor that keeps one worker as its child process.

The class is sent as it is, so that it can say that this package is missing there, or of another version.
"""

from __future__ import annotations

from typing import Any


def actor_class() -> type:
    """The class of the actors. It uses nothing of this module: its code is shipped, not imported."""

    class MergefrontWorker:
        def __init__(self) -> None:
            self.child: Any = None

        def begin(self, job: dict[str, Any]) -> dict[str, Any]:
            """Starts the worker; says where it runs, and how the storage names it or why it was refused."""
            import os
            import socket
            import subprocess
            import sys
            from pathlib import Path

            host = socket.gethostname()
            try:
                import search
                from search.storage.worker import worker_of
            except ImportError as error:
                return {"host": host, "refused": f"mergefront is not installed there ({error})."}
            if search.__version__ != job["version"]:
                return {
                    "host": host,
                    "refused": f"found mergefront {search.__version__} there, wanted {job['version']} as here.",
                }
            if job["host"] not in (None, host):
                return {
                    "host": host,
                    "refused": "a SQLite storage serves one machine. Give a server's --storage.",
                }
            path = [str(Path(search.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {
                **os.environ,
                "MERGEFRONT_STORAGE": job["url"],  # it may hold a password: not among the arguments
                "MERGEFRONT_EVIDENCE": job["evidence"],
                "OMP_NUM_THREADS": str(job["threads"]),
                "PYTHONPATH": os.pathsep.join(path),
            }
            if not job["gpus"]:
                environment["CUDA_VISIBLE_DEVICES"] = ""
            # Its input is a pipe of this process: it ends when this process does, however that happens.
            self.child = subprocess.Popen(
                [sys.executable, "-m", "search.cli.main", "-q", *job["command"]],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,
            )
            return {"host": host, "refused": None, "worker": worker_of(self.child.pid).to_json()}

        def wait(self) -> tuple[int, str]:
            """The worker's exit code once it ended, and its error in one line, if it printed one."""
            import sys

            last = ""
            for line in self.child.stderr:
                sys.stderr.write(line)  # to Ray's log of this actor
                if line.startswith("error: "):
                    last = line.removeprefix("error: ").strip()
            return int(self.child.wait()), last

        def stop(self, seconds: float) -> bool:
            """Lets the worker give its trial back, and comes back when it has ended; False if it had to be killed."""
            import subprocess

            if self.child is None:
                return True
            self.child.terminate()
            try:
                self.child.wait(seconds)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
                return False
            return True

    return MergefrontWorker
