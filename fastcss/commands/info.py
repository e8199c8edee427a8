"""Runs ``python -m fastcss info``: prints what this installation can run."""

from __future__ import annotations

import argparse

from .._dispatch.info import info

HELP = "versions, devices, and which implementations run here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: the command takes no arguments."""


def run(options: argparse.Namespace) -> None:
    for section, lines in info().items():
        print(section)
        for line in lines.items() if isinstance(lines, dict) else ((line,) for line in lines):
            print("  " + ": ".join(line))
