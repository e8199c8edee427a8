"""``python -m benchmarks.choose_on_gpu FILE.jsonl…``: says which kernels impl="auto" may choose, from a GPU's rows.

It may choose a kernel that was verified, and no slower than the op's composed form, in every case and mode of its op.
Whoever measured a GPU puts what is printed into ``fastcss/_dispatch/backends.py``, as ``MEASURED_ON_GPU``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from . import report

KERNELS = ("triton", "cuda")
COMPOSED = ("composed", "by level")  # the names that cases have for it


def ratios(rows: Sequence[dict]) -> dict[str, dict[str, dict[str, float]]]:
    """Compute op → kernel → point → its time ÷ the composed form's, inf if it did not run or was wrong."""
    points: dict[tuple, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["device"] == "cuda":
            point = _op(row), f"{row['case']} {row['mode']} on {row['device_name']}"
            points[point][row["provider"]] = row["median_ms"] if row["verified"] else math.inf
    found: dict = defaultdict(lambda: defaultdict(dict))
    for (op, point), times in points.items():
        composed = min((times[name] for name in COMPOSED if name in times), default=None)
        for kernel in KERNELS:
            if composed is not None and kernel in times:
                found[op][kernel][point] = times[kernel] / composed if composed < math.inf else 0.0
    return found


def _op(row: dict) -> str:
    return "top_classes" if row["case"].startswith("cost_filter/topk") else row["op"]


def supported(rows: Sequence[dict]) -> dict[str, tuple[str, ...]]:
    """Say what MEASURED_ON_GPU may be: the kernels of each op, the faster one first."""
    found = {}
    for op, kernels in ratios(rows).items():
        faster = {kernel: points.values() for kernel, points in kernels.items() if max(points.values()) <= 1}
        if faster:
            found[op] = tuple(sorted(faster, key=lambda kernel: sum(faster[kernel]) / len(faster[kernel])))
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.choose_on_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("file", nargs="+", type=Path, help="rows of a GPU")
    rows = [row for file in parser.parse_args(arguments).file for row in report.read(file)]
    print("MEASURED_ON_GPU =", supported(rows))
    for kernels in ratios(rows).values():
        for kernel, points in kernels.items():
            for point, ratio in points.items():
                if ratio > 1:
                    print(f"  {kernel} takes {ratio:.2f} of the composed form's time: {point}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
