"""Files and folders that are written whole or not at all, and tensors that are read without unpickling anything."""

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
    """A file that takes the place of ``path`` when the block ends; nobody, and no kill, ever meets half of it.

    Raises:
        OSError: it cannot be written, say for want of space; names ``path``.
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
    """An empty folder to write into, which becomes ``path`` when the block ends.

    Whatever happens before that leaves at ``path`` what was there. A folder that a killed process has left half-written
    has another name and is removed by the next call for the same path. There must be one writer at a time.

    Raises:
        FileExistsError: ``path`` is there, and is not to be overwritten.
        OSError: it cannot be written, say for want of space.
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
        if isinstance(error, SafetensorError):  # how safetensors reports that it could not write
            raise OSError(f"{path} cannot be written: {error}") from error
        if isinstance(error, OSError) and error.filename is None:  # a full disk is met by writes that know no name
            error.filename = str(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def standing_folder(path: Path) -> Path:
    """Where the folder ``path`` is: elsewhere only if a process was killed at the moment of overwriting it."""
    old = _old(path)
    return old if old.exists() and not path.exists() else path


def read_tensors(path: Path, caller: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ``caller`` is who to name in errors.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not whole, or there is a pickle in its place.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        for pickle in (path.with_suffix(suffix) for suffix in (".bin", ".pt", ".pth")):
            if pickle.is_file():
                raise ValueError(
                    f"{caller}: {pickle} is a pickle, and loading it would run any code in it; save it as safetensors "
                    "(peft's and transformers' save_pretrained do by default)"
                )
        raise FileNotFoundError(f"{caller}: {path} is missing")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{caller}: {path} is no whole safetensors file: {error}") from error


def _new(path: Path) -> Path:
    return path.with_name(f".{path.name}.new")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _tidy(path: Path) -> None:
    """Undo what was begun and not finished."""
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
