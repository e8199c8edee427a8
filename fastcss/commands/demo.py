"""``python -m fastcss demo``: the package at work on one photograph."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import demo

HELP = "six adapters on one photograph, in turn and in one pass"
add_arguments = demo.add_arguments


def run(options: argparse.Namespace) -> None:
    if options.model and not Path(options.model).is_dir():
        raise FileNotFoundError(f"--model: no such folder: {options.model}")
    demo.run(options.out, options.model, options.tune_malloc)
