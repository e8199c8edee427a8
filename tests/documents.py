"""Reads README.md, the other papers and docs/ for tests: blocks of code by section, and what only a reader has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("README.md", "CONTRIBUTING.md", "DESIGN.md", "SECURITY.md")
GUIDES = [*(ROOT / paper for paper in PAPERS), *sorted(ROOT.glob("docs/*.md"))]
REFERENCE = sorted(ROOT.glob("docs/reference/*.md"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


class Section(NamedTuple):
    """A heading, and the text up to the next one."""

    heading: str
    text: str

    def blocks(self, *languages: str) -> list[str]:
        return [code for language, code in FENCE.findall(self.text) if language in languages]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def sections(path: Path) -> list[Section]:
    text = path.read_text(encoding="utf-8")
    code = [match.span() for match in FENCE.finditer(text)]  # where "# …" is a comment
    headings = [m for m in HEADING.finditer(text) if not any(first <= m.start() < last for first, last in code)]
    ends = [*(match.start() for match in headings[1:]), len(text)]
    return [Section(match[1], text[match.start() : end]) for match, end in zip(headings, ends, strict=True)]


def anchor(heading: str) -> str:
    """Make the anchor of a heading as GitHub does."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def inline_code(path: Path) -> list[str]:
    return re.findall(r"`([^`]+)`", prose(path))


def readers_program(folder: Path, kind: str) -> dict:
    """Make what an example expects of its reader's program: a PEFT model of six tasks of this ``kind``, inputs for it,
    and in ``folder`` the adapters as PEFT saves them."""
    from one_pass import adapted_models

    build = getattr(adapted_models, kind)
    sites = adapted_models.SITES[build]
    torch.manual_seed(0)
    peft_model = adapted_models.adapt(build(), *({"r": r, "target_modules": sites} for r in (4, 8, 3, 4, 2, 4)))
    peft_model.save_pretrained(folder / "runs")
    one, several = adapted_models.inputs(build), adapted_models.inputs(build, 3)
    return {
        "peft_model": peft_model,
        "model": build().eval(),
        "detector": adapted_models.object_detector() if kind == "grounding_dino" else None,
        "image": one["pixel_values"],
        "text": one.get("input_ids"),
        "batch": several["pixel_values"],
        "texts": several.get("input_ids"),
        "index": torch.tensor([3, -1, 0]),
    }


def readers_data(folder: Path) -> None:
    """PASCAL VOC 2012 and ADE20K of one picture each."""
    from PIL import Image

    voc, ade = folder / "VOCdevkit" / "VOC2012", folder / "ADEChallengeData2016"
    for place in (voc / "JPEGImages/0.jpg", ade / "images/validation/ADE_val_00000001.jpg"):
        place.parent.mkdir(parents=True)
        Image.new("RGB", (4, 3)).save(place)
    for place in (voc / "SegmentationClass/0.png", ade / "annotations/validation/ADE_val_00000001.png"):
        place.parent.mkdir(parents=True)
        Image.new("L", (4, 3)).save(place)
    names = voc / "ImageSets" / "Segmentation" / "val.txt"
    names.parent.mkdir(parents=True)
    names.write_text("0\n")
