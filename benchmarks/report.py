"""Writes results as a table for persons and as a file for programs."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastcss._files import whole_file

from .cases import OURS
from .harness import Outcome

MACHINE = ("device", "device_name", "malloc")
#: Rows that agree in these fields belong to the comparison of one run. Newer rows replace all older ones, whose times
#: are from another moment; so a provider that was not measured again has no row any more.
POINT = ("case", "mode", "dtype", *MACHINE)


def show(outcome: Outcome, console: Console) -> None:
    """Print one case as a table: our row first, the others by time."""
    rows = sorted(outcome.rows, key=lambda row: (row["provider"] != OURS, row["median_ms"] or float("inf")))
    medians = {row["provider"]: row["median_ms"] for row in rows}
    first = rows[0] if rows else None
    if first:
        title = f"{first['case']}  {first['mode']}  {first['dtype']}  {first['device_name']}  malloc {first['malloc']}"
        table = Table(title=title, title_justify="left")
        table.add_column("provider")
        for column in ("median ms", "p20…p80", f"÷ {OURS}", "% of limit", "peak MiB", "GFLOP/s", "GB/s", "error"):
            table.add_column(column, justify="right")
        for row in rows:
            ours = OURS + "+graph" * row["provider"].endswith("+graph")
            table.add_row(row["provider"], *_cells(row, medians.get(ours)))
        console.print(table)
    for provider, remark in outcome.remarks.items():
        console.print(f"  {provider}: {remark}", markup=False, highlight=False)


def _cells(row: dict, ours: float | None) -> list[str]:
    error = f"{row['error']:.1e}"
    if not row["verified"]:
        return ["wrong", *["–"] * 6, error]
    median = row["median_ms"]
    return [
        f"{median:.3f}",
        f"{row['p20_ms']:.3f}…{row['p80_ms']:.3f}",
        f"{median / ours:.2f}" if ours else "–",
        f"{100 * row['limit_ms'] / median:.0f}",
        "–" if row["peak_mib"] is None else f"{row['peak_mib']:.1f}",
        f"{row['gflops']:.0f}",
        f"{row['gbps']:.1f}",
        error,
    ]


def read(path: Path) -> list[dict]:
    """Read the rows of a results file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is no row of ours; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
            lacking = [name for name in (*POINT, "provider", "op", "median_ms", "verified") if name not in rows[-1]]
        except (ValueError, TypeError):
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:40]!r}") from None
        if lacking:
            raise ValueError(f"{path}, line {number} is no row of a benchmark: it lacks {', '.join(lacking)}")
    return rows


def merge_into(path: Path, rows: Sequence[dict]) -> None:
    """Put ``rows`` into a results file in place of their older measurements; it is replaced whole or not at all."""
    merged = _points(read(path) if path.exists() else []) | _points(rows)
    # Strict JSON has no Infinity: the error of a wrong shape becomes null.
    lines = [
        json.dumps({k: None if v == float("inf") else v for k, v in row.items()}) for row in chain(*merged.values())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file:
        file.writelines(line + "\n" for line in lines)


def _points(rows: Sequence[dict]) -> dict[tuple, list[dict]]:
    points = defaultdict(list)
    for row in rows:
        points[tuple(row[name] for name in POINT)].append(row)
    return points


def file_name(device_name: str) -> str:
    """Name the results file of a device: ``NVIDIA H200`` → ``nvidia-h200.jsonl``."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-") + ".jsonl"
