"""Reads the adapter folders of a pool: what they hold at once, their weights when a call wants them."""

from __future__ import annotations

import dataclasses
import json
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .._files import check_is_there
from .fit_layers import scale_of
from .read_adapters import kind_of
from .read_folders import by_layer, check_targets, read_config, why_by_peft
from .read_saved import CALLER, CONFIG_FILE, WEIGHTS_FILE

POOL = "AdapterPool"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: These make an adapter more than A and B of layers; ``one_pass.from_directories`` runs the most of them.
REFUSED = ("lora_bias", "use_dora", "modules_to_save", "ensure_weight_tying")


@dataclasses.dataclass(frozen=True)
class Part:
    """Says where a tensor lies in a file: its first byte after the header, its dtype and its shape."""

    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """Holds what a folder says of one layer: the places of A and B, rank and scale."""

    layer: str
    a: Part
    b: Part
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def floats(self) -> int:
        return math.prod(self.a.shape) + math.prod(self.b.shape)


@dataclasses.dataclass(frozen=True)
class AdapterFile:
    """Holds one adapter's folder as it was when it was read.

    Attributes:
        name, folder: the adapter's name, and where it lies.
        paths: its config and its weights.
        pieces: its layers; folders that are alike share one tuple.
        start: the byte at which the tensors begin.
        stamps: modification time, size and inode of its two files.
    """

    name: str
    folder: Path
    paths: tuple[str, str]
    pieces: tuple[Piece, ...]
    start: int
    stamps: tuple[tuple[int, int, int], ...]

    def check(self) -> None:
        """Raise if the folder is no more what it was.

        Raises:
            FileNotFoundError: one of its files is gone.
            RuntimeError: one of them has changed.
        """
        try:
            now = tuple(map(_stamp, map(os.stat, self.paths)))
        except OSError as error:
            raise FileNotFoundError(
                f"{POOL}: adapter {self.name!r}: {error.filename} is gone; put it back, or route without this adapter"
            ) from error
        if now != self.stamps:
            raise self._has_changed()

    def _has_changed(self) -> RuntimeError:
        return RuntimeError(
            f"{POOL}: adapter {self.name!r}: {self.folder} has changed since it was read; "
            f"pool.refresh({self.name!r}) reads it anew"
        )

    def tensors(self) -> Iterator[tuple[Piece, Tensor, Tensor]]:
        """Yield each layer's A and B as views of the mapped file.

        Raises:
            FileNotFoundError, RuntimeError: as ``check`` does, also if the file was written while it was read.
        """
        self.check()
        with open(self.paths[1], "rb") as file:
            if _stamp(os.fstat(file.fileno())) != self.stamps[1]:
                raise self._has_changed()
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        for piece in self.pieces:
            yield piece, self._view(mapped, piece.a), self._view(mapped, piece.b)
        self.check()

    def _view(self, mapped: mmap.mmap, part: Part) -> Tensor:
        count = math.prod(part.shape)
        return torch.frombuffer(mapped, dtype=part.dtype, count=count, offset=self.start + part.begin).view(part.shape)


class Reader:
    """Reads folders for one model. Folders of one recipe, alike in all but values, are compared with it once."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._modules = model, dict(model.named_modules())
        self._known: dict[tuple[str, bytes], tuple[Piece, ...]] = {}

    def read(self, name: str, folder: Path) -> AdapterFile:
        """Read what ``folder`` holds, without its weights.

        Raises:
            FileNotFoundError, TypeError, ValueError: the folder is incomplete, of another kind or of another model.
        """
        try:
            config = read_config(folder)  # first, for what it says of a file that is missing
            check_is_there(folder / WEIGHTS_FILE, CALLER)
            paths = str(folder / CONFIG_FILE), str(folder / WEIGHTS_FILE)
            stamps = tuple(map(_stamp, map(os.stat, paths)))
            header, start, size = _header(paths[1])
            key = json.dumps(config, sort_keys=True), header
            if key not in self._known:
                self._known[key] = self._pieces(folder, config, header, size - start)
            return AdapterFile(name, folder, paths, self._known[key], start, stamps)
        except (FileNotFoundError, TypeError, ValueError) as error:
            kind = next(kind for kind in (FileNotFoundError, TypeError, ValueError) if isinstance(error, kind))
            raise kind(f"{POOL}: {str(error).removeprefix(f'{CALLER}: ')}") from error

    def _pieces(self, folder: Path, config: dict, header: bytes, size: int) -> tuple[Piece, ...]:
        why = why_by_peft(folder, config, self._model)
        why = why or next((f"{folder} uses {option}" for option in REFUSED if config.get(option)), None)
        init = config.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(("pissa", "olora")):
            why = why or f"{folder} was initialised by {init}, which takes a part of the base layer out"
        if why:
            raise TypeError(f"{why}; a pool holds plain LoRA, and one_pass.from_directories runs other adapters, too")
        parts = _parts(folder, header, size)
        beside = next((key for key in parts if ".lora_" not in key), None)
        if beside is not None:
            raise TypeError(f"{folder}: {beside!r} is no LoRA weight; a pool holds plain LoRA")
        shapes = {key: torch.empty(part.shape, dtype=part.dtype, device="meta") for key, part in parts.items()}
        place = {id(tensor): parts[key] for key, tensor in shapes.items()}
        layers = by_layer(folder, shapes, self._model)
        check_targets(folder, config, self._model, layers)
        pieces = []
        for layer, held in layers.items():
            base = self._modules[layer]
            scale = scale_of(f"{folder}: layer {layer!r}", base, held, config, layer)
            if base.weight.dtype == torch.float64:
                raise TypeError(f"{folder}: layer {layer!r} is float64; a pool holds its adapters in float32")
            if kind_of(base) == "conv2d" and base.groups > 1:
                raise TypeError(f"{folder}: layer {layer!r} is a grouped convolution, which a pool does not run")
            pieces.append(Piece(layer, place[id(held["a"])], place[id(held["b"])], scale))
        return tuple(pieces)


def _stamp(stat: os.stat_result) -> tuple[int, int, int]:
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _header(path: str) -> tuple[bytes, int, int]:
    """Return the header of a safetensors file, the place at which it ends, and the file's size."""
    with open(path, "rb") as file:
        size, length = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is no whole safetensors file: its header ends past the end of the file")
        return file.read(length), 8 + length, size


def _parts(folder: Path, header: bytes, size: int) -> dict[str, Part]:
    """Return the tensors of a file by name, all of which lie within its ``size`` bytes of data."""
    path = folder / WEIGHTS_FILE
    try:
        entries = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
        found = {key: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for key, e in entries.items()}
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    parts = {}
    for key, (dtype, shape, begin, end) in found.items():
        if dtype not in DTYPES:
            raise TypeError(f"{path}: {key!r} is {dtype}; LoRA weights are {', '.join(DTYPES)}")
        if not 0 <= begin <= end <= size or end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{path} is no whole safetensors file: {key!r} {list(shape)} lies outside of it")
        parts[key] = Part(begin, DTYPES[dtype], shape)
    return parts
