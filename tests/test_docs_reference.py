"""Tests that docs/reference says what the docstrings say, of every public name, and its examples give what they
show."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

import pytest
from documents import REFERENCE, ROOT, anchor, inline_code, name_of, readers_data, readers_program, sections

import fastcss
from docs import make_reference
from fastcss import data

PACKAGES = {"fastcss": fastcss, "ops": fastcss.ops, "nn": fastcss.nn, "data": data}


def test_it_is_up_to_date():
    expected = make_reference.pages()
    assert sorted(expected) == REFERENCE
    for path, text in expected.items():
        same = path.read_text(encoding="utf-8") == text
        assert same, f"{name_of(path)} is out of date; make it anew by: python docs/make_reference.py"


@pytest.mark.parametrize("page", PACKAGES)
def test_every_public_name_is_there(page):
    said = set(inline_code(ROOT / "docs" / "reference" / f"{page}.md"))
    names = {name for name in PACKAGES[page].__all__ if not inspect.ismodule(getattr(PACKAGES[page], name))}
    assert names <= said


@pytest.mark.parametrize("page", REFERENCE, ids=name_of)
def test_a_name_has_a_heading_of_its_own(page):
    headings = [anchor(section.heading) for section in sections(page)]
    assert len(headings) == len(set(headings))


class AsFarAsShown(doctest.OutputChecker):
    """Accepts any output of an example that shows none, and compares numbers to the digits that are shown."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        if re.fullmatch(r"\d+\.\d+\n", want):
            digits = len(want.strip().partition(".")[2])
            return round(float(got), digits) == float(want)
        return not want or super().check_output(want, got, optionflags)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("page", REFERENCE, ids=name_of)
def test_its_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readers_data(tmp_path)
    preamble, *entries = sections(page)
    given = readers_program(tmp_path, "vit") if "peft_model" in page.read_text(encoding="utf-8") else {}
    (imports,) = preamble.blocks("python")
    exec(imports, given)
    assert any(entry.blocks("pycon") for entry in entries)
    for entry in entries:
        for example in entry.blocks("pycon"):
            said: list[str] = []
            case = doctest.DocTestParser().get_doctest(example, given, entry.heading, name_of(Path(page)), 0)
            doctest.DocTestRunner(AsFarAsShown()).run(case, out=said.append)
            assert not said, "".join(said)
