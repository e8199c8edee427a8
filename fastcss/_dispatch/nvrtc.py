"""The kernels of csrc/cuda compiled on the machine that runs them, by NVRTC through CuPy: for an installation without
the compiled module. Nothing is compiled, and CuPy is not imported, before an op's first call.

A launcher here does what csrc/cuda/<op>.cu does: it lays the kernel's parameters out in the order of the struct in
<op>.cuh, whose constants (``kThreads``, …) it reads, and counts blocks."""

from __future__ import annotations

import importlib.util
import re
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .._schema import LIBRARY

WARP = 32
SCAN = "select_tokens_scan.cuh"
_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def why_not() -> str | None:
    """None where the kernels can be compiled and run, else the reason."""
    if importlib.util.find_spec("cupy") is None:
        return "the package cupy is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device is there"
    try:  # the part of CuPy that finds the library, by which CuPy itself does; all of CuPy takes a second to import
        from cupy_backends.cuda.libs import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        return f"CuPy finds no NVRTC ({reason}): install it with the extra that has it, cupy-cuda13x[ctk]"
    return None


def register() -> None:
    """Give the raw ops these launchers as their CUDA implementation."""
    for launcher in LAUNCHERS:
        LIBRARY.impl(f"{launcher.__name__}.cuda", launcher, "CUDA")


def folder() -> Path:
    """Of the kernels' sources: beside this file where they are installed, csrc/cuda in a checkout."""
    installed = Path(__file__).parents[1] / "cuda"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "csrc" / "cuda"


def _text(file: str) -> str:
    return (folder() / file).read_text()


def source(file: str) -> str:
    """A file of csrc/cuda with what it includes in place of its includes: CuPy's cache of compiled kernels knows the
    text that it is given, and no file beside it."""
    seen: set[str] = set()

    def read(name: str) -> str:
        text = "" if name in seen else _text(name).replace("#pragma once", "")
        seen.add(name)
        return re.sub(r'#include "(.+)"', lambda include: read(include[1]), text)

    return read(file)


@cache
def constant(file: str, name: str) -> int:
    """The number that a kernel's source gives ``name``."""
    return int(re.search(rf"constexpr int {name} = (\d+);", _text(file))[1])


@cache
def _module(file: str, device: int):
    import cupy

    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(file), options=("--std=c++17",))


def launch_with_cupy(file: str, name: str, grid: tuple[int, int, int], threads: int, params: bytes) -> None:
    """Launch a kernel of csrc/cuda/<file>, which takes one struct, on torch's current device and stream."""
    import cupy
    import numpy

    device = torch.cuda.current_device()
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        # CuPy passes an array of one element by value.
        struct_of_params = numpy.frombuffer(params, dtype=f"V{len(params)}")
        _module(file, device).get_function(name)(grid, (threads, 1, 1), (struct_of_params,))


#: Replaced where the kernels run on something else.
launch = launch_with_cupy


def _launch(
    file: str, name: str, dtype: torch.dtype | None, grid: Sequence[int], *params: Tensor | int | float | None,
    threads: int | None = None,
) -> None:  # fmt: skip
    """Each parameter is a member of the struct, 8 bytes all of them: a tensor's address, an integer or a double."""
    if 0 in grid:
        return
    values = [0 if p is None else p.data_ptr() if isinstance(p, Tensor) else p for p in params]
    packed = struct.pack("".join("d" if isinstance(v, float) else "q" for v in values), *values)
    name = name if dtype is None else f"{name}_{_TYPES[dtype]}"
    with torch.cuda.device_of(next(p for p in params if isinstance(p, Tensor))):
        launch(file, name, (*grid, 1, 1)[:3], threads or constant(file, "kThreads"), packed)


def _blocks(count: int, each: int) -> int:
    return -(-count // each)


def top_classes(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    file, (batch, classes) = "top_classes.cuh", score.shape
    values, index = score.new_empty(batch, k), score.new_empty((batch, k), dtype=torch.int64)
    grid = (batch, _blocks(k, constant(file, "kBlockRanks")))
    _launch(file, "top_classes", score.dtype, grid, score, *score.stride(), classes, k, values, index)
    return values, index


def merge_masks(
    masks: Tensor, scores: Tensor, order: Tensor, height: int, width: int, crop_height: int, crop_width: int,
    threshold: float, want_score: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    file = "merge_masks.cuh"
    labels = masks.new_empty((height, width), dtype=torch.int64)
    score = scores.new_empty((height, width) if want_score else (0,))
    grid = [_blocks(size, constant(file, "kTile")) for size in (width, height)]
    _launch(
        file, "merge_masks", masks.dtype, grid,
        *(masks, *masks.stride(), *masks.shape, scores, *scores.stride(), scores.element_size()),
        *(order, *order.stride(), height, width, crop_height, crop_width, float(threshold)),
        *(labels, score if want_score else None),
    )  # fmt: skip
    return labels, score


def prompt_mlp(z: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    file, rows = "prompt_mlp.cuh", len(z)
    columns = constant(file, "kColumnBytes") // z.element_size()
    hidden, y = z.new_empty((rows, w1.shape[2]), dtype=torch.float32), z.new_empty(rows, w2.shape[2])
    for name, x, weight, bias, out in (("hidden", z, w1, b1, hidden), ("output", hidden, w2, b2, y)):
        _launch(
            file, f"prompt_mlp_{name}", z.dtype, (rows, _blocks(weight.shape[2], columns)),
            *(x, *x.stride(), weight, *weight.stride(), bias, *bias.stride()),
            *(index, *index.stride(), *weight.shape, out),
        )  # fmt: skip
    return y, hidden


def prompt_mlp_backward(
    dy: Tensor, z: Tensor, w1: Tensor, w2: Tensor, index: Tensor, hidden: Tensor, need_dz: bool, need_weights: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    (rows, inputs), (classes, width, outputs) = z.shape, w2.shape
    shapes = (w1.shape, (classes, width), w2.shape, (classes, outputs)) if need_weights else ((0,),) * 4
    dz, dhidden, hidden = z.new_empty(z.shape if need_dz else (0,)), hidden.new_empty(hidden.shape), hidden.contiguous()
    dw1, db1, dw2, db2 = (w1.new_empty(shape) for shape in shapes)
    file, warps = "prompt_mlp.cuh", constant("prompt_mlp.cuh", "kThreads") // WARP
    layers = (("dhidden", dy, w2, hidden, dhidden), ("dz", dhidden, w1, None, dz))
    for name, x, weight, positive, out in layers if need_dz else layers[:1]:
        _launch(
            file, f"prompt_mlp_{name}", z.dtype, (rows, _blocks(weight.shape[1], warps)),
            *(x, *x.stride(), weight, *weight.stride(), positive, index, *index.stride()),
            *(classes, weight.shape[2], weight.shape[1], out),
        )  # fmt: skip
    file = "prompt_mlp_backward.cuh"
    layers = (("dw1", z, dhidden, dw1, db1), ("dw2", hidden, dy, dw2, db2))
    for name, x, slope, dweight, dbias in layers if need_weights else ():
        inputs, outputs = x.shape[1], slope.shape[1]
        columns, height = _blocks(outputs, constant(file, "kColumns")), _blocks(max(inputs, 1), constant(file, "kRows"))
        _launch(
            file, f"prompt_mlp_{name}", z.dtype, (columns, height, classes),
            *(x, *x.stride(), slope, *slope.stride(), index, *index.stride(), rows, inputs, outputs, dweight, dbias),
        )  # fmt: skip
    return dz, dw1, db1, dw2, db2


def select_tokens(
    tokens: Tensor, classes: Tensor, threshold: float, length: int, best_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    file, (batch, count, channels), class_count = "select_tokens.cuh", tokens.shape, classes.shape[1]
    selected, presence = tokens.new_empty(batch, class_count, length), tokens.new_empty(batch, class_count)
    counts, support = (tokens.new_empty((batch, class_count), dtype=torch.int64) for _ in range(2))
    best, cosine = (tokens.new_empty((batch, count), dtype=dtype) for dtype in (torch.int32, torch.float32))
    tiles = _blocks(count, constant(file, "kTokens"))
    words, reaching = (0, 0) if best_only else (_blocks(class_count, constant(file, "kClasses")), class_count)
    above = best.new_empty(batch, count, words)
    sums, reach = (cosine.new_empty(batch, reaching, tiles) for _ in range(2))
    _launch(
        file, "select_tokens_assign", tokens.dtype, (batch * tiles,),
        *(tokens, *tokens.stride(), classes, *classes.stride(), count, class_count, channels, tiles),
        *(float(threshold), best, cosine, words, above, sums, reach),
    )  # fmt: skip
    _launch(
        file, "select_tokens_collect", tokens.dtype, (batch * class_count,),
        *(tokens, *tokens.stride(), count, class_count, channels, length, best, cosine, words, tiles, sums, reach),
        *(selected, counts, presence, support),
        threads=constant(SCAN, "kThreads"),
    )  # fmt: skip
    return selected, counts, presence, support, best, above


def select_tokens_backward(
    dselected: Tensor, dpresence: Tensor, tokens: Tensor, classes: Tensor, support: Tensor, best: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    file, (batch, count, channels), class_count = "select_tokens_backward.cuh", tokens.shape, classes.shape[1]
    slices, threads = _blocks(count, constant(file, "kSlice")), constant(file, "kThreads")
    dtokens, dclasses = tokens.new_empty(tokens.shape), classes.new_empty(classes.shape)
    rank, inverse = best.new_empty(best.shape), best.new_empty(best.shape, dtype=torch.float32)
    slope, units = inverse.new_empty(batch, class_count), inverse.new_empty(batch, class_count, slices, channels)
    params = (
        *(dselected, *dselected.stride(), dpresence, *dpresence.stride(), tokens, *tokens.stride()),
        *(classes, *classes.stride(), support.contiguous(), best.contiguous(), above.contiguous()),
        *(above.shape[2], batch, count, class_count, channels, dselected.shape[2], slices),
        *(rank, slope, inverse, units, dtokens, dclasses),
    )
    rows = batch * class_count
    _launch(file, "select_tokens_rank", tokens.dtype, (rows,), *params, threads=constant(SCAN, "kThreads"))
    for name, grid in (
        ("dtokens", (_blocks(batch * count, threads // WARP),)),
        ("units", (rows, slices, _blocks(channels, constant(file, "kChannels")))),
        ("dclasses", (rows,)),
    ):
        _launch(file, f"select_tokens_{name}", tokens.dtype, grid, *params)
    return dtokens, dclasses


LAUNCHERS = (top_classes, merge_masks, prompt_mlp, prompt_mlp_backward, select_tokens, select_tokens_backward)
