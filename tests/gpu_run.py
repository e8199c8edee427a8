"""``pytest -p gpu_run --kept FILE``: runs the tests on a GPU that one has for minutes at a time.

Outcomes are added to FILE as they come, what passed or was skipped is not run again, and what failed comes last. Tests
that use no device are left to ``make test``. A kernel that faults spoils CUDA for its process: this one then ends, and
pytest-xdist starts another that goes on with the next test.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

SPOILS_THE_PROCESS = ("CUDA error", "Triton Error [CUDA]")


def pytest_addoption(parser):
    parser.addoption("--kept", type=Path, required=True, help="JSONL of outcomes, which the next run goes on from")


def pytest_configure(config):
    config.pluginmanager.register(Worker(config) if hasattr(config, "workerinput") else Controller(config))


def last_outcomes(file: Path) -> dict[str, str]:
    """Read the last outcome of each test."""
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return {row["test"]: row["outcome"] for row in rows}


class Order:
    """Selects the tests to run and orders them: the same in every process, also in one that starts later."""

    def __init__(self, before: dict[str, str]):
        self.before = before

    def pytest_collection_modifyitems(self, config, items):
        on_device = [item for item in items if "device" in item.fixturenames]
        left = [item for item in on_device if self.before.get(item.nodeid) not in ("passed", "skipped")]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        items[:] = sorted(left, key=lambda item: item.nodeid in self.before)


class Controller(Order):
    def __init__(self, config):
        self.file = config.getoption("--kept")
        super().__init__(last_outcomes(self.file))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["before"] = self.before

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or not report.passed:
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
            if not report.passed:
                crash = getattr(report.longrepr, "reprcrash", None)
                row["why"] = (crash.message if crash else report.longreprtext).strip().partition("\n")[0][:300]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a") as kept:
                kept.write(json.dumps(row) + "\n")

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.before:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter):
        outcomes = list(last_outcomes(self.file).values())
        counts = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("passed", "failed", "skipped"))
        terminalreporter.line(f"of this run and those before: {counts}")


class Worker(Order):
    def __init__(self, config):
        super().__init__(config.workerinput["before"])

    @pytest.hookimpl(trylast=True)  # after the report was sent
    def pytest_runtest_logreport(self, report):
        if report.failed and any(words in report.longreprtext for words in SPOILS_THE_PROCESS):
            os._exit(1)
