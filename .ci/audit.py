"""Looks up every pinned version in the advisories that pip-audit reads; fails if one is known to be vulnerable.

    python .ci/audit.py

Where the service cannot be reached, or knows nothing of a package, that is said: such a package was not audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent / "constraints.txt"


def main() -> int:
    """Prints the findings and one line of summary; returns the exit code."""
    # One that does not start would pass for a service that does not answer.
    subprocess.run([sys.executable, "-m", "pip_audit", "--version"], check=True)
    command = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(CONSTRAINTS),
        "--no-deps",
        "--disable-pip",
    ]
    command += ["--format", "json", "--progress-spinner", "off", "--timeout", "30"]
    ran = subprocess.run(command, capture_output=True, text=True)
    try:
        packages = json.loads(ran.stdout)["dependencies"]
    except ValueError:
        last = (ran.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"pip-audit: NOT AUDITED, no answer from the advisory service: {last}")
        return 0
    known = [package for package in packages if "skip_reason" not in package]
    found = 0
    for package in known:
        for advisory in package["vulns"]:
            found += 1
            fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
            print(f"pip-audit: {package['name']} {package['version']}: {advisory['id']}, mended in {fixed}")
    skipped = len(packages) - len(known)
    print(
        f"pip-audit: {len(known)} packages audited, {found} advisories, {skipped} NOT AUDITED (unknown to the service)"
    )
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
