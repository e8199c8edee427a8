"""Runs ``python -m fastcss convert-sam``: makes segment-anything's checkpoint a folder of transformers."""

from __future__ import annotations

import argparse

HELP = "make segment-anything's checkpoint a folder of transformers"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", help="a sam_vit_*.pth, as published or within what a trainer saved; no code is run"
    )
    parser.add_argument("out", help="the folder to make")


def run(options: argparse.Namespace) -> None:
    from ..models.convert_sam import SIZES, convert_sam

    vision = convert_sam(options.checkpoint, options.out).vision_config
    name = SIZES.get(vision.hidden_size, "SAM")
    layers, width, side = vision.num_hidden_layers, vision.hidden_size, vision.image_size
    print(f"{options.out}: {name}, {layers} layers of width {width}, {side} pixels")
