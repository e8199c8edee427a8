"""What the compilers made of the kernels, kept in ``reports/``: to compile them all takes two cores six minutes, and
the result is the same for as long as the sources and the compiler are.

A report that no longer belongs to them is made anew and replaced by the test that reads it; commit it with the kernel.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from fastcss._files import whole_file

FOLDER = Path(__file__).with_name("reports")
ROOT = Path(__file__).parents[2]


def report(name: str, sources: Iterable[Path], compiler: str, compile: Callable[[], list[dict]]) -> list[dict]:
    """The rows that ``compile`` returns for these sources and this compiler: the kept ones if both are as they were."""
    path = FOLDER / f"{name}.json"
    made_from = {"compiler": compiler, "sources": _digest(sources)}
    kept = json.loads(path.read_text()) if path.exists() else {"made_from": None}
    if kept["made_from"] != made_from:
        kept = {"made_from": made_from, "rows": compile()}
        with whole_file(path) as file:
            rows = ",\n".join(map(json.dumps, kept["rows"]))
            file.write(f'{{"made_from": {json.dumps(made_from)}, "rows": [\n{rows}\n]}}\n')
    return kept["rows"]


def _digest(sources: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
