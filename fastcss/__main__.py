"""``python -m fastcss info``, ``python -m fastcss demo`` and ``python -m fastcss convert-sam``."""

import argparse
from pathlib import Path

from . import demo
from ._info import info


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastcss", description="Kernels for continual segmentation.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which implementations run here")
    demo.add_arguments(commands.add_parser("demo", help="six adapters on one photograph, in turn and in one pass"))
    convert = commands.add_parser("convert-sam", help="make segment-anything's checkpoint a folder of transformers")
    convert.add_argument("checkpoint", help="a sam_vit_*.pth; only tensors are loaded from it, no code is run")
    convert.add_argument("out", help="the folder to make")
    options = parser.parse_args()
    if options.command == "info":
        _print_info()
        return
    if options.command == "convert-sam":
        _convert_sam(parser, options.checkpoint, options.out)
        return
    if options.model and not Path(options.model).is_dir():
        parser.error(f"--model: no such folder: {options.model}")
    try:
        demo.run(options.out, options.model, options.tune_malloc)
    except ModuleNotFoundError as error:
        parser.error(f"the demo needs {error.name}, which is not installed: pip install 'fastcss[demo]'")


def _convert_sam(parser: argparse.ArgumentParser, checkpoint: str, out: str) -> None:
    try:
        from .models.convert_sam import SIZES, convert_sam

        vision = convert_sam(checkpoint, out).vision_config
    except ModuleNotFoundError as error:
        parser.error(f"convert-sam needs {error.name}, which is not installed: pip install 'fastcss[peft]'")
    except (OSError, ValueError) as error:
        parser.error(f"convert-sam: {error}")
    name = SIZES.get(vision.hidden_size, "SAM")
    print(f"{out}: {name}, {vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.image_size} pixels")


def _print_info() -> None:
    for section, lines in info().items():
        print(section)
        for line in lines.items() if isinstance(lines, dict) else ((line,) for line in lines):
            print("  " + ": ".join(line))


if __name__ == "__main__":
    main()
