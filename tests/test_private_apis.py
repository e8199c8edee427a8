"""Each private API of torch, Triton and transformers in use does what the package takes it to do; else, what stops.

Where one of these fails on a new release, ``fastcss/_dispatch/private_apis.py`` is the file to mend.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import private_checks_of_compilers  # noqa: F401  adds its own
import pytest
import torch
from private_checks_of_torch import CHECKS

import fastcss  # noqa: F401  defines the ops
from fastcss._dispatch import private_apis as apis

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", apis.__all__)
def test_it_is_there_and_does_what_we_need(name):
    assert name in CHECKS, f"{name} has no check here"
    stops, check = CHECKS[name]
    try:
        check()
    except Exception as error:
        raise AssertionError(f"{name} of torch {torch.__version__} is not what it was; what stops: {stops}") from error


def _private(path: Path) -> list[str]:
    """Names of torch's or Triton's private parts that a file uses by itself."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", ast.unparse(node)):
            names = [ast.unparse(node)]
        else:
            continue
        for name in names:
            first, *rest = name.split(".")
            if first in ("torch", "triton", "transformers", "forward_ad") and any(
                part.startswith("_") and not part.endswith("__") for part in rest
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {name}")
    return found


def test_no_other_file_uses_any():
    files = [path for room in ("fastcss", "kernels") for path in (ROOT / room).rglob("*.py")]
    found = [use for path in files if path.name != "private_apis.py" for use in _private(path)]
    assert not found, "\n".join(["these belong into fastcss/_dispatch/private_apis.py:", *found])
