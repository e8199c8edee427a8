"""Every command, file and test that README.md, other papers and docs/ name is there, with the options given to it."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from documents import GUIDES, REFERENCE, ROOT, anchor, inline_code, name_of, prose, sections

from benchmarks import __main__ as benchmarks
from fastcss import __main__ as fastcss

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def commands(path: Path) -> list[str]:
    """The lines of a shell's blocks, and what is one within a sentence."""
    lines = [line for section in sections(path) for block in section.blocks("", "sh") for line in block.splitlines()]
    starts = ("make ", "python ", "pip ")
    return [line for line in lines if line.strip()] + [code for code in inline_code(path) if code.startswith(starts)]


COMMANDS = sorted({(name_of(path), command) for path in (*GUIDES, *REFERENCE) for command in commands(path)})


@pytest.mark.parametrize(("where", "command"), COMMANDS)
def test_a_command_is_one(where, command, capsys):
    for one in command.split(" && "):
        words = shlex.split(one, comments=True)
        while re.fullmatch(r"[A-Z_]+=.*", words[0]):  # of the environment
            words.pop(0)
        match words:
            case ["make", *targets]:
                check_make(targets)
            case ["pip", "install", *what]:
                check_pip(what)
            case ["pre-commit", "install"]:
                assert (ROOT / ".pre-commit-config.yaml").exists()
            case ["python", "-m", "pytest", *arguments] | ["pytest", *arguments]:
                check_pytest(arguments)
            case ["python", "-m", "fastcss", *arguments]:
                check_fastcss(arguments)
            case ["python", "-m", "benchmarks", *arguments]:
                if "--compare" in arguments:  # with rows that another command of the page makes
                    place = arguments.index("--compare")
                    _, rows = arguments[place : place + 2]
                    assert any(page == where and f"--out {rows}" in other for page, other in COMMANDS)
                    del arguments[place : place + 2]
                assert benchmarks.main([*arguments, "--list"]) == 0
                assert capsys.readouterr().out.count("/")
            case ["python", "-m", module, *arguments]:
                check_options(importlib.util.find_spec(module).origin, arguments)
            case ["python", script, *arguments]:
                check_options(ROOT / script, arguments)
            case _:
                pytest.fail(f"{where}: no test knows what {one!r} is")


def check_make(arguments: list[str]) -> None:
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        pattern = rf"^{re.escape(name)} \?=" if is_variable else rf"^{re.escape(name)}( .*)?:"
        assert re.search(pattern, MAKEFILE, re.MULTILINE), argument


def check_pip(packages: list[str]) -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extra in re.findall(r"\w+", " ".join(re.findall(r"\[(.*?)\]", " ".join(packages)))):
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE), extra


def check_pytest(arguments: list[str]) -> None:
    """Check that the files and modules to run exist, and that the suite has the options that are its own."""
    what = [argument for argument in arguments if re.match(r"(tests|benchmarks|fastcss)\b", argument)]
    assert what
    own = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8")
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert option == "--pyargs" or f'"{option}"' in own, option
    for path in what:
        module = "--pyargs" in arguments
        assert importlib.util.find_spec(path) if module else (ROOT / path).exists(), path


def check_fastcss(arguments: list[str]) -> None:
    if len(arguments) < 2:  # in a sentence the name alone
        assert set(arguments) <= set(fastcss.COMMANDS)
    else:
        fastcss._parser().parse_args(arguments)
    if arguments == ["info"]:
        fastcss.main(arguments)


def check_options(source: Path | str, arguments: list[str]) -> None:
    text = Path(source).read_text(encoding="utf-8")
    for option in (argument for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in text, option


@pytest.mark.parametrize("path", [*GUIDES, *REFERENCE], ids=name_of)
def test_links_lead_somewhere(path):
    for target, to in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", prose(path)):
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not to or to in {anchor(section.heading) for section in sections(there)}, f"{target}#{to}"


@pytest.mark.parametrize("path", GUIDES, ids=name_of)
def test_files_and_what_is_in_them_are_there(path):
    """``tests/conftest.py``, ``csrc/cuda/``; of ``file.py::name`` a definition, too."""
    rooms = r"(?:fastcss|kernels|csrc|tests|benchmarks|docs|packaging)/[\w./-]*|[\w-]+\.(?:py|toml|md)|Makefile"
    for code in inline_code(path):
        if re.fullmatch(rf"({rooms})(::\w+)?", code):
            file, _, name = code.partition("::")
            assert (ROOT / file).exists(), code
            assert not name or re.search(rf"\b(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8")), code
