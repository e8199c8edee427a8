"""Finds the files of a room of raw ops, so that no list names them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable


def import_files(room: str, folder: Iterable[str]) -> None:
    """Import every module of the package ``room``, in order of the names: each makes the raw ops of its name known.

    torch raises where two files define the same raw op, or give one the same implementation.
    """
    for file in pkgutil.iter_modules(folder):
        importlib.import_module(f"{room}.{file.name}")
