"""The table of fault cases that a run prints at its end: which faults struck, how often, and what was lost.

A test below tests/faults/ names its case with `@pytest.mark.fault(7)`; the cases are listed in `CASES`. A test that
strikes more than once says so through the fixture `fault`; one that runs a study says how many finished trials are
gone or changed afterwards, and so fails if there are any.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pytest

CASES = {
    1: "kill -9 at every step, and at random moments",
    2: "SIGTERM and Ctrl-C",
    3: "a worker frozen past its grace, then thawed",
    4: "a recipe that always ends its worker",
    5: "resumed with another study file, other parents or questions",
    6: "a finished study run again",
    7: "several workers on one storage",
    8: "two workers adopt one dead worker's trial",
    9: "two exports into one folder",
    10: "a locked database",
    11: "a disk that fills up during an export",
    12: "a database that fills up",
    13: "storages that are none, damaged, read-only or foreign",
    14: "studies of older versions",
    15: "damaged weight files",
    16: "a flipped bit in the weights",
    17: "weights that are no numbers, zero, subnormal, or overflow",
    18: "hostile shard indexes",
    19: "pickles, by name and by content",
    20: "code in a model folder, and the network",
    21: "parents that do not fit together",
    22: "hostile and mistaken study files, any bytes",
    23: "control characters in names",
    24: "an evaluator that fails",
    25: "out of memory in a trial",
    26: "a trial that exceeds its time",
    27: "empty, constant and failed data",
    28: "the same seed again, one thread against two",
    29: "a clock that is set back",
    30: "python -O, and another locale",
}


@dataclass
class Fault:
    """What one test did: `tries` faults struck; `lost` finished trials, None if no study was at stake."""

    tries: int = 1
    lost: int | None = None

    def struck(self, times: int) -> None:
        """Says how many faults the test caused in all."""
        self.tries = times

    def kept(self, before: dict[int, Any], after: dict[int, Any]) -> None:
        """Counts finished trials, as number -> whatever must stay the same, that are gone or changed.

        Raises:
            AssertionError: some are.
        """
        gone = [number for number, value in before.items() if number not in after or after[number] != value]
        self.lost = (self.lost or 0) + len(gone)
        assert not gone, f"finished trials lost or changed: {gone}"


@pytest.fixture
def fault(request: pytest.FixtureRequest) -> Fault:
    """What the test did, for the table."""
    record = Fault()
    request.node.stash[_RECORD] = record
    return record


_RECORD = pytest.StashKey[Fault]()


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Sends the record along with the last report, which reaches the process that prints, too."""
    for marker in item.iter_markers("fault"):
        record = item.stash.get(_RECORD, Fault())
        item.user_properties.append(("fault", [marker.args[0], record.tries, record.lost]))


class FaultTable:
    """Collects the reports of all tests, wherever they ran, and prints the table."""

    def __init__(self) -> None:
        self._failed: set[str] = set()
        self._skipped: set[str] = set()
        self._records: list[tuple[str, int, int, int | None]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._failed.add(report.nodeid)
        if report.skipped:
            self._skipped.add(report.nodeid)
        if report.when == "teardown":
            for name, value in report.user_properties:
                if name == "fault":
                    self._records.append((report.nodeid, *value))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if not self._records:
            return
        rows: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
        at_stake = set()
        for node, case, tries, lost in self._records:
            row = rows[case]
            if node in self._skipped:
                row[4] += 1
                continue
            row[0] += 1
            row[1] += tries
            row[2] += lost or 0
            row[3] += node in self._failed
            if lost is not None:
                at_stake.add(case)
        write = terminalreporter.write_line
        terminalreporter.section("faults")
        write(f"{'case':>4}  {'':<60} {'tests':>5} {'tries':>6} {'lost trials':>12}")
        for case in sorted(rows):
            tests, tries, lost, failed, skipped = rows[case]
            gone = str(lost) if case in at_stake else "-"
            note = "".join([f"  {failed} FAILED" * bool(failed), f"  {skipped} skipped" * bool(skipped)])
            write(f"{case:>4}  {CASES[case]:<60} {tests:>5} {tries:>6} {gone:>12}{note}")
        total = [sum(row[i] for row in rows.values()) for i in range(3)]
        write(f"{'':>4}  {'all':<60} {total[0]:>5} {total[1]:>6} {total[2]:>12}")
        if missing := [str(case) for case in sorted(CASES) if case not in rows]:
            write(f"cases without a test in this run: {', '.join(missing)}")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the table once in each process."""
    config.addinivalue_line("markers", "fault(case): a case of the fault table (tests/fault_table.py)")
    config.pluginmanager.register(FaultTable(), "fault-table")
