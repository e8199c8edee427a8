"""Keeps in ``reports/`` what the compilers made of the kernels: to compile them all takes two cores six minutes, and
the result stays the same while the sources and the compiler do.

If a report no longer belongs to them, the tests read one that is made anew, and write nothing into the tree;
``pytest tests/kernels --keep-reports`` replaces the kept ones. Commit them with the kernel.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fastcss._files import whole_file

FOLDER = Path(__file__).with_name("reports")
ROOT = Path(__file__).parents[2]


class Reports:
    """The kept reports, and in ``made`` those that had to be made anew: into ``kept`` itself they are replaced."""

    def __init__(self, kept: Path, made: Path) -> None:
        self.folders = (made, kept)

    def rows(self, name: str, sources: Iterable[Path], compiler: str, compile: Callable[[], list[dict]]) -> list[dict]:
        """Return what ``compile`` gives for these sources and this compiler: the kept rows, if both are as they
        were."""
        made_from = {"compiler": compiler, "sources": digest(sources)}
        made = self.folders[0] / f"{name}.json"
        with open(self.folders[0] / f".{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be making the same
            for folder in self.folders:
                report = _read(folder / made.name)
                if report["made_from"] == made_from:
                    return report["rows"]
            found = compile()
            with whole_file(made) as file:
                rows = ",\n".join(map(json.dumps, found))
                file.write(f'{{"made_from": {json.dumps(made_from)}, "rows": [\n{rows}\n]}}\n')
        return found


def _read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"made_from": None}


def digest(sources: Iterable[Path]) -> str:
    """Hash names and contents; comments, Python's docstrings and layout do not count, as no compiler reads them."""
    found = hashlib.sha256()
    for path in sorted(sources):
        text = "".join(_code(path)) if path.suffix == ".py" else _cuda_code(path.read_text())
        found.update(f"{path.name}\0{text}\0".encode())
    return found.hexdigest()[:16]


#: A string or character, which may have in it what looks like a comment; or a comment.
_STRING_OR_COMMENT = re.compile(r"""("(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')|//[^\n]*|/\*.*?\*/""", re.DOTALL)


def _cuda_code(text: str) -> str:
    lines = _STRING_OR_COMMENT.sub(lambda found: found[1] or " ", text).splitlines()
    return "\n".join(line.rstrip() for line in lines if line.strip())


#: Tokens that say nothing by their text, and what stands for them.
_MARKS = {tokenize.NEWLINE: "\n", tokenize.INDENT: "{", tokenize.DEDENT: "}"}


def _code(path: Path) -> Iterator[str]:
    begins = True  # a statement, which a string alone makes a docstring
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL):
            continue
        if not (begins and token.type == tokenize.STRING):
            yield _MARKS.get(token.type, token.string)
        begins = token.type in _MARKS
