from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch.nvrtc import WARP, blocks, constant, launch, launcher

SCAN = "select_tokens_scan.cuh"


@launcher
def select_tokens(
    tokens: Tensor, classes: Tensor, threshold: float, length: int, best_only: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    file, (batch, count, channels), class_count = "select_tokens.cuh", tokens.shape, classes.shape[1]
    selected, presence = tokens.new_empty(batch, class_count, length), tokens.new_empty(batch, class_count)
    counts, support = (tokens.new_empty((batch, class_count), dtype=torch.int64) for _ in range(2))
    best, cosine = (tokens.new_empty((batch, count), dtype=dtype) for dtype in (torch.int32, torch.float32))
    tiles = blocks(count, constant(file, "kTokens"))
    words, reaching = (0, 0) if best_only else (blocks(class_count, constant(file, "kClasses")), class_count)
    above = best.new_empty(batch, count, words)
    sums, reach = (cosine.new_empty(batch, reaching, tiles) for _ in range(2))
    launch(
        file, "select_tokens_assign", tokens.dtype, (batch * tiles,),
        *(tokens, *tokens.stride(), classes, *classes.stride(), count, class_count, channels, tiles),
        *(float(threshold), best, cosine, words, above, sums, reach),
    )  # fmt: skip
    launch(
        file, "select_tokens_collect", tokens.dtype, (batch * class_count,),
        *(tokens, *tokens.stride(), count, class_count, channels, length, best, cosine, words, tiles, sums, reach),
        *(selected, counts, presence, support),
        threads=constant(SCAN, "kThreads"),
    )  # fmt: skip
    return selected, counts, presence, support, best, above


@launcher
def select_tokens_backward(
    dselected: Tensor, dpresence: Tensor, tokens: Tensor, classes: Tensor, support: Tensor, best: Tensor, above: Tensor
) -> tuple[Tensor, Tensor]:
    file, (batch, count, channels), class_count = "select_tokens_backward.cuh", tokens.shape, classes.shape[1]
    slices, threads = blocks(count, constant(file, "kSlice")), constant(file, "kThreads")
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
    launch(file, "select_tokens_rank", tokens.dtype, (rows,), *params, threads=constant(SCAN, "kThreads"))
    for name, grid in (
        ("dtokens", (blocks(batch * count, threads // WARP),)),
        ("units", (rows, slices, blocks(channels, constant(file, "kChannels")))),
        ("dclasses", (rows,)),
    ):
        launch(file, f"select_tokens_{name}", tokens.dtype, grid, *params)
    return dtokens, dclasses
