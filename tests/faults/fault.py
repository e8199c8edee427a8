"""Defines a planted fault."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Holds a small wrong change of one file, and the tests that have to fail by it.

    Attributes:
        name: what is wrong, in a few words with dashes between them.
        file: where; a path in the repository.
        old: the text that is there, exactly once.
        new: what takes its place.
        tests: arguments of pytest, at most some ten seconds of tests.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
