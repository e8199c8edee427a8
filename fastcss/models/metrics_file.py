"""Keeps a run's measurements in its ``metrics.jsonl``, one line of JSON each."""

from __future__ import annotations

import json
import os
from pathlib import Path


def append_metrics(folder: str | Path, record: dict) -> None:
    """Add a line to ``metrics.jsonl``; drop half a line that a killed process has left at its end."""
    with open(Path(folder) / "metrics.jsonl", "ab+") as file:
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        file.write(json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_metrics(folder: str | Path) -> list[dict]:
    """Read the complete lines of ``metrics.jsonl``; none if there is no such file."""
    path = Path(folder) / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"DecoupleCSS: {path}, line {number}: {error}") from error
    return records
