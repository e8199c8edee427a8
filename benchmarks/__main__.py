"""``python -m benchmarks [OP…] [--case NAME] [--mode fwd|bwd] [--device cpu|cuda] [--quick] [--out FILE.jsonl]``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from fastcss._malloc import tune_malloc

from . import harness, registry, report


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no CUDA device")
    try:
        cases = registry.select(registry.all_cases(options.device, options.quick), options.op, options.case)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0

    malloc = options.malloc
    if malloc == "tuned" and not tune_malloc():
        malloc = "default"
    out = Path(options.out) if options.out else None
    if out and (out.is_dir() or str(options.out).endswith("/")):
        out = out / report.file_name(harness.device_name(options.device))
    console = Console(width=None if sys.stdout.isatty() else 140)
    right = True
    for case in cases:
        for mode in [options.mode] if options.mode else case.modes:
            if mode not in case.modes:
                console.print(f"{case.name} has no mode {mode}", markup=False)
                continue
            outcome = harness.run(case, mode, options.device, malloc, seconds=0.1 if options.quick else 1.0)
            report.show(outcome, console)
            right &= any(row["provider"] == registry.OURS and row["verified"] for row in outcome.rows)
            if out:
                report.merge_into(out, outcome.rows)
    if out:
        console.print(f"rows are in {out}", markup=False)
    return 0 if right else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Verify, time and tabulate every provider of each case. Exit code 1: fastcss was wrong somewhere.",
    )
    parser.add_argument("op", nargs="*", help="ops to run (default: all)")
    parser.add_argument("--case", action="append", default=[], help="run the cases whose name starts so; repeatable")
    parser.add_argument("--mode", choices=registry.MODES, help="bwd is forward and backward (default: every mode)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, short runs: is it right, not how fast")
    parser.add_argument(
        "--malloc",
        choices=("tuned", "default"),
        default="tuned",
        help="the C library's setting, for all providers",
    )
    parser.add_argument("--out", help="JSONL file for the rows, or a folder: then named after the device")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
