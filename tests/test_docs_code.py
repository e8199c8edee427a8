"""Tests that every block of Python in README.md and docs/ runs as it is printed, section by section."""

from __future__ import annotations

import pytest
from documents import GUIDES, name_of, readers_program, sections

SECTIONS = [(path, section) for path in GUIDES for section in sections(path) if section.blocks("python")]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("path", "section"), [pytest.param(*s, id=f"{name_of(s[0])} {s[1].heading}") for s in SECTIONS]
)
def test_it_runs(path, section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = section.blocks("python")
    of_the_reader = any(name in block for block in code for name in ("peft_model", "fuse(model)", "(detector, config"))
    names = readers_program(tmp_path, "grounding_dino") if of_the_reader else {}
    for block in code:
        exec(compile(block, f"{name_of(path)}, {section.heading}", "exec"), names)
