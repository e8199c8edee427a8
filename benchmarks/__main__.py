"""``python -m benchmarks [OP…] [--case NAME] [--mode fwd|bwd] [--device cpu|cuda] [--provider NAME] [--quick]
[--out FILE.jsonl] [--compare OLD.jsonl]``: verifies, times and compares every provider of each case."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from fastcss._tune_malloc import tune_malloc

from . import compare, harness, measure, registry, report
from .cases import MODES, OURS, Case

#: Seconds that are spent on each provider of a case, on average: all cases then take less than twenty minutes on two
#: cores. A CPU with only AVX2 needs torch.compile's results in its caches for that, and else four minutes more.
SECONDS = 0.05


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    out = Path(options.out) if options.out else None
    if out and (out.is_dir() or str(options.out).endswith("/")):
        out = out / report.file_name(harness.device_name(options.device))
    if options.malloc == "tuned" and not tune_malloc():
        options.malloc = "default"
    try:
        cases = registry.select(registry.all_cases(options.device, options.quick), options.op, options.case)
        old = _old_rows(options, cases) if options.compare else []
        if out and out.exists():
            report.read(out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0

    console = Console(width=None if sys.stdout.isatty() else 140)
    for case in cases:
        if options.mode not in (None, *case.modes):
            console.print(f"{case.name} has no mode {options.mode}", markup=False)
    points = [(case, mode) for case in cases for mode in case.modes if options.mode in (None, mode)]
    rows = _run(points, options, out, console)
    right = _right(rows)
    if options.compare:
        found = compare.compare(rows, old)
        # A slow moment passes, a slower kernel does not: a regression is what is slower twice.
        slower = {(change.case, change.mode) for change in found.changes if change.regressed}
        again = [(case, mode) for case, mode in points if (case.name, mode) in slower]
        if again:
            names = ", ".join(f"{case.name} {mode}" for case, mode in again)
            console.print(f"slower than before, so measured again: {names}", markup=False, highlight=False)
            second = _run(again, options, out, console)
            right &= _right(second)
            found = compare.compare(rows + second, old)
        compare.show(found, console)
        right &= not found.worse
    if out:
        console.print(f"rows are in {out}", markup=False)
    return 0 if right else 1


def _run(
    points: Sequence[tuple[Case, str]], options: argparse.Namespace, out: Path | None, console: Console
) -> list[dict]:
    """Measure each case and mode, show and write the rows as they come, and return them."""
    rows = []
    for case, mode in points:
        outcome = harness.run(case, mode, options.device, options.malloc, SECONDS, options.provider or None)
        measure.give_memory_back()
        report.show(outcome, console)
        rows += outcome.rows
        if out:
            report.merge_into(out, outcome.rows)
    return rows


def _right(rows: Sequence[dict]) -> bool:
    """Tell whether fastcss ran and was verified wherever any provider ran; ``rows`` come from one run."""
    ours = [row for row in rows if row["provider"] == OURS]
    return all(row["verified"] for row in ours) and len(ours) == len({(row["case"], row["mode"]) for row in rows})


def _old_rows(options: argparse.Namespace, cases: Sequence[Case]) -> list[dict]:
    """Read the rows that this run will measure again, before it may write into the same file.

    Raises:
        OSError: there is no such file.
        ValueError: it has no such rows.
    """
    here = {"device": options.device, "device_name": harness.device_name(options.device), "malloc": options.malloc}
    names = {case.name for case in cases}
    left_out = {case.name for case in registry.all_cases(options.device, options.quick)} - names
    found = [
        row
        for row in report.read(Path(options.compare))
        if row["case"] not in left_out
        and all(row[name] == value for name, value in here.items())
        and registry.matches(row["op"], row["case"], options.op, options.case)
        and options.mode in (None, row["mode"])
        and row["case"].endswith("-quick") == options.quick
    ]
    if not any(row["provider"] == OURS and row["verified"] for row in found):
        wanted = ", ".join(f"{name} {value!r}" for name, value in here.items())
        raise ValueError(f"--compare: {options.compare} has no rows of these cases with {wanted}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Verify, time and tabulate every provider of each case. Exit code 1: fastcss was wrong somewhere, "
        "or slower than in the rows to compare with.",
    )
    parser.add_argument("op", nargs="*", help="ops to run (default: all)")
    parser.add_argument("--case", action="append", default=[], help="run the cases whose name starts so; repeatable")
    parser.add_argument("--mode", choices=MODES, help="bwd is forward and backward (default: every mode)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--provider",
        action="append",
        default=[],
        help="leave out all others but fastcss, where a call takes minutes; repeatable",
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, for what is right, not for what is fast")
    parser.add_argument(
        "--malloc",
        choices=("tuned", "default"),
        default="tuned",
        help="the C library's setting, for all providers",
    )
    parser.add_argument("--out", help="JSONL file for the rows, or a folder: then named after the device")
    parser.add_argument("--compare", metavar="OLD", help="JSONL of older rows: what is slower beyond noise, twice?")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
