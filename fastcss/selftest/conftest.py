"""Sets threads, and prints a table after the tests: which op ran on which implementation, and why others did not."""

from __future__ import annotations

import platform
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

import fastcss

_outcomes: dict[tuple[str, str], Counter] = defaultdict(Counter)
_reasons: dict[str, str] = {}


@pytest.fixture(autouse=True)
def threads():
    """Begin each test with one thread, since waiting for others takes longer than tensors this small; yield torch's."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield count
    torch.set_num_threads(count)


def pytest_runtest_logreport(report):
    cell = dict(report.user_properties).get("cell")
    if cell is None or (report.when != "call" and report.passed):
        return
    name, place = cell
    _outcomes[name, place][report.outcome] += 1
    if report.skipped:
        _reasons.setdefault(place, report.longrepr[2])


def pytest_terminal_summary(terminalreporter):
    write = terminalreporter.line
    terminalreporter.section("what ran")
    write(f"fastcss {fastcss.__version__} in {Path(fastcss.__file__).parent}")
    write(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}")
    places = list(dict.fromkeys(place for _, place in _outcomes))
    rows = [["", *places]]
    for name in dict.fromkeys(name for name, _ in _outcomes):
        rows.append([name, *(_cell(_outcomes[name, place]) for place in places)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        write("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    for place, reason in _reasons.items():
        write(f"{place}: {reason.removeprefix('Skipped: ')}")


def _cell(outcomes: Counter) -> str:
    if outcomes["failed"]:
        return f"{outcomes['failed']} FAILED"
    return f"{outcomes['passed']} passed" if outcomes["passed"] else "–"
