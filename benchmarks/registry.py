"""Finds all benchmark cases, whichever file of this folder defines them, and finds those that a name means."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from fastcss.ops import __all__ as OPS

from .cases import Case

FOLDER = Path(__file__).parent


def modules() -> list[ModuleType]:
    """Import the files of this folder that define ``cases``, and no others: ops first, then what is made of them."""
    defines = re.compile(r"^def cases\(device: str, quick: bool\)", re.MULTILINE)
    names = [path.stem for path in FOLDER.glob("*.py") if defines.search(path.read_text(encoding="utf-8"))]
    return [importlib.import_module(f"{__package__}.{name}") for name in sorted(names, key=_ops_first)]


def _ops_first(name: str) -> tuple[bool, str]:
    return name not in OPS, name


def all_cases(device: str, quick: bool = False) -> list[Case]:
    """List every case of a device. ``quick`` gives small stand-ins under their own names, which end in ``-quick``."""
    return [case for module in modules() for case in module.cases(device, quick)]


def select(cases: Sequence[Case], ops: Sequence[str] = (), names: Sequence[str] = ()) -> list[Case]:
    """Select these ops' cases whose name starts with one of ``names``, with or without the op in front; default: all.

    Raises:
        ValueError: an op or a name matches nothing; the message lists what there is.
    """
    known = list(dict.fromkeys(case.op for case in cases))
    for op in ops:
        if op not in known:
            raise ValueError(f"no op {op!r}; there are: {', '.join(known)}")
    cases = [case for case in cases if matches(case.op, case.name, ops)]
    for name in names:
        if not any(matches(case.op, case.name, prefixes=[name]) for case in cases):
            listed = "\n  ".join(case.name for case in cases)
            raise ValueError(f"no case starts with {name!r}; there are:\n  {listed}")
    return [case for case in cases if matches(case.op, case.name, prefixes=names) and (names or not case.by_name)]


def matches(op: str, case: str, ops: Sequence[str] = (), prefixes: Sequence[str] = ()) -> bool:
    """Tell whether a case belongs to one of these ops and starts so, with or without the op in front."""
    starts = tuple(prefixes) or ("",)
    return (not ops or op in ops) and (case.startswith(starts) or case.removeprefix(op + "/").startswith(starts))
