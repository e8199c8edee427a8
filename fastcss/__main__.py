"""``python -m fastcss info`` and ``python -m fastcss demo``."""

import argparse
from pathlib import Path

from . import demo
from ._info import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcss", description="Kernels for continual segmentation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which implementations run here")
    demo.add_arguments(commands.add_parser("demo", help="six adapters on one photograph, in turn and in one pass"))
    options = parser.parse_args()
    if options.command == "info":
        _print_info()
        return
    if options.model and not Path(options.model).is_dir():
        parser.error(f"--model: no such folder: {options.model}")
    try:
        demo.run(options.out, options.model, options.tune_malloc)
    except ModuleNotFoundError as error:
        parser.error(f"the demo needs {error.name}, which is not installed: pip install 'fastcss[demo]'")


def _print_info() -> None:
    for section, lines in info().items():
        print(section)
        for line in lines.items() if isinstance(lines, dict) else ((line,) for line in lines):
            print("  " + ": ".join(line))


if __name__ == "__main__":
    main()
