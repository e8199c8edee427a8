"""Writes files and folders whole or not at all, and reads tensors without unpickling anything."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from safetensors import SafetensorError
from torch import Tensor


@contextlib.contextmanager
def whole_file(path: Path, binary: bool = False) -> Iterator[IO]:
    """Open a file that takes the place of ``path`` when the block ends.

    No reader ever sees half of it, even if the process is killed.

    Raises:
        OSError: the file cannot be written, for example because the disk is full; the error names ``path``.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(beside, "xb" if binary else "x", encoding=None if binary else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        if isinstance(error, OSError) and error.filename in (None, str(beside)):
            error.filename = str(path)
            del error.filename2
        raise
    _sync(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Make an empty folder to write into, which becomes ``path`` when the block ends.

    Until then ``path`` stays as it was, whatever happens. A folder that a killed process has left half-written has
    another name, and the next call for the same path removes it. There must be one writer at a time.

    Raises:
        FileExistsError: ``path`` exists, and is not to be overwritten.
        OSError: the folder cannot be written, for example because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _tidy(path)
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already")
    new, old = _new(path), _old(path)
    try:
        new.mkdir()
        yield new
        _sync_all(new)
        if path.exists():  # a folder cannot be replaced in one step; for the moment between, see standing_folder
            os.rename(path, old)
        os.rename(new, path)
        _sync(path.parent)
    except BaseException as error:
        _tidy(path)
        if isinstance(error, SafetensorError):  # safetensors reports a failed write this way
            raise OSError(f"{path} cannot be written: {error}") from error
        if isinstance(error, OSError) and error.filename is None:  # writes to a full disk do not name the file
            error.filename = str(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def standing_folder(path: Path) -> Path:
    """Return where the folder ``path`` is: elsewhere only if a process was killed while it overwrote the folder."""
    old = _old(path)
    return old if old.exists() and not path.exists() else path


def read_tensors(path: Path, caller: str) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file; errors name ``caller``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is incomplete, or there is a pickle in its place.
    """
    from safetensors.torch import load_file

    check_is_there(path, caller)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{caller}: {path} is no whole safetensors file: {error}") from error


def check_is_there(path: Path, caller: str) -> None:
    """Raise, as ``read_tensors`` does, if ``path`` is missing or there is a pickle in its place."""
    if path.is_file():
        return
    for pickle in (path.with_suffix(suffix) for suffix in (".bin", ".pt", ".pth")):
        if pickle.is_file():
            raise ValueError(
                f"{caller}: {pickle} is a pickle, and loading it would run any code in it; save it as safetensors "
                "(peft's and transformers' save_pretrained do by default)"
            )
    raise FileNotFoundError(f"{caller}: {path} is missing")


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _tidy(path: Path) -> None:
    """Undo a write that was begun and not finished."""
    new, old = _new(path), _old(path)
    if standing_folder(path) == old:
        os.rename(old, path)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for inside, _, files in os.walk(folder):
        for name in files:
            _sync(Path(inside, name))
        _sync(Path(inside))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
