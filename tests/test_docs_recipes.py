"""Tests that docs/recipes.md has every model and recipe, and says of some what comes of them here."""

from __future__ import annotations

import re

import pytest
from documents import ROOT, sections

from docs import make_recipes

NOTE = re.compile(r"\[\^\d+\]")  # whose number depends on the rows before
ROWS = {
    section.heading: {line.split(" | ")[0].removeprefix("| "): line for line in section.text.splitlines()}
    for section in sections(ROOT / "docs" / "recipes.md")
}


def test_every_recipe_is_there():
    for model, about in make_recipes.MODELS.items():
        for recipe, config in make_recipes.RECIPES.items():
            assert (recipe in ROWS[model]) == bool(config(about, 0)), f"{model}, {recipe}: python docs/make_recipes.py"


def test_nothing_is_wrong():
    assert make_recipes.SAID["wrong"] not in make_recipes.PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        ("SegFormer", "LoRA, head saved whole"),
        ("ViT, classification", "DoRA"),
        ("CLIP", "LoRA, trainable tokens"),
    ],
)
@pytest.mark.usefixtures("one_thread")
@pytest.mark.filterwarnings("ignore")
def test_a_row_says_what_comes_of_it(model, recipe):
    found = make_recipes.outcomes(model, recipe)
    line = make_recipes.line(recipe, (make_recipes.cell(found[way], []) for way in make_recipes.WAYS))
    assert NOTE.sub("", ROWS[model][recipe]) == NOTE.sub("", line), "python docs/make_recipes.py writes it anew"
