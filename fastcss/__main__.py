"""``python -m fastcss info``."""

import argparse

from ._info import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcss", description="Kernels for continual segmentation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which implementations run here")
    parser.parse_args()
    for section, lines in info().items():
        print(section)
        for line in lines.items() if isinstance(lines, dict) else ((line,) for line in lines):
            print("  " + ": ".join(line))


if __name__ == "__main__":
    main()
