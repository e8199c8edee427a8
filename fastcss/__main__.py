"""Runs ``python -m fastcss COMMAND``: a module of ``fastcss.commands``, whose errors become exit codes."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from . import __version__

COMMANDS = ("demo", "train", "evaluate", "segment", "info", "convert-sam")
EXAMPLES = """\
examples:
  python -m fastcss train --data digits --setting 2-2 --out run
  python -m fastcss segment scene.png --model run --out out
  python -m fastcss convert-sam sam_vit_b_01ec64.pth checkpoints/sam-vit-b
"""
#: A user can put these errors right by another argument; any other OSError comes from the machine.
BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
FAILURE, USAGE, INTERRUPTED = 1, 2, 130  # the codes of shells and argparse


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command that the arguments name, by default those of the process; raise SystemExit if it fails."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal cannot show must not stop the command
        stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of the output is gone; Python would flush the rest and fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILURE)
    except ModuleNotFoundError as error:
        if (error.name or "fastcss").partition(".")[0] == "fastcss":
            raise
        _fail(options.command, _missing(error), USAGE)
    except BAD_INPUT as error:
        _fail(options.command, _message(error), USAGE)
    except (OSError, FloatingPointError) as error:
        _fail(options.command, _message(error), FAILURE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastcss",
        description="Every task adapter of a continual-segmentation model in one pass.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
        command = commands.add_parser(name, help=module.HELP, description=_sentence(module.HELP))
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _missing(error: ModuleNotFoundError) -> str:
    text = str(error)
    return text if "pip install" in text else f"{error.name} is not installed: pip install 'fastcss[commands]'"


def _message(error: Exception) -> str:
    known = isinstance(error, OSError) and error.strerror and error.filename
    text = f"{error.filename}: {error.strerror}" if known else str(error) or type(error).__name__
    return " ".join(text.splitlines())


def _fail(command: str, message: str, code: int) -> None:
    print(f"python -m fastcss {command}: error: {message}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
