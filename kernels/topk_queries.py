"""Triton implementation of fastcss::topk_queries: the tokens of the largest logit, whose logits are never written.

There are 2·B·N·C·D FLOP for B·N·D elements: 150 FLOP per byte at C = 150 in 16 bits, where products and memory take
about the same time, 3 µs for 22,223 tokens of 256 columns, so launches count as much. A program goes through the
classes while its tokens stay in the cache, and writes 4 bytes per token. Then the k best are found as in top_classes,
by the float32 scores, and their rows are gathered.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._schema import LIBRARY
from .cost_filter import largest, nan_or_larger
from .multi_lora import precision
from .multi_lora_device import dot, load_tile
from .top_classes import best_of_rows
from .tuned import tuned


@triton.jit
def token_score_kernel(
    features, prototypes, bias, score,
    N, C, D, stride_fb, stride_fn, stride_fd, stride_pc, stride_pd,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """score [B, N] = max_c (features · prototypes_c + bias_c)."""
    blocks = tl.cdiv(N, BLOCK_N)
    row = tl.program_id(0) % blocks * BLOCK_N
    batch = tl.cast(tl.program_id(0) // blocks, tl.int64)
    features += batch * stride_fb
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for c in range(0, C, BLOCK_C):
        acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for d in range(0, D, BLOCK_D):
            tokens = load_tile(features, row, d, N, D, stride_fn, stride_fd, BLOCK_N, BLOCK_D)
            acc = dot(tokens, load_tile(prototypes, d, c, D, C, stride_pd, stride_pc, BLOCK_D, BLOCK_C), acc, PRECISION)
        classes = c + tl.arange(0, BLOCK_C)
        if bias is not None:
            acc += tl.load(bias + classes, mask=classes < C, other=0.0).to(tl.float32)[None, :]
        best = nan_or_larger(best, largest(tl.where((classes < C)[None, :], acc, float("-inf")), 1))
    rows = row + tl.arange(0, BLOCK_N)
    tl.store(score + batch * N + rows, best, mask=rows < N)


@triton.jit
def gather_rows_kernel(features, index, queries, k, D, stride_b, stride_n, stride_d, BLOCK_D: tl.constexpr):
    """queries [B, k, D]: the rows index [B, k] of features."""
    place = tl.cast(tl.program_id(0), tl.int64)
    source = features + place // k * stride_b + tl.load(index + place) * stride_n
    for d in range(0, D, BLOCK_D):
        depth = d + tl.arange(0, BLOCK_D)
        row = tl.load(source + depth.to(tl.int64) * stride_d, mask=depth < D)
        tl.store(queries + place * D + depth, row, mask=depth < D)


@tuned("BLOCK_N", "BLOCK_C", "BLOCK_D")
def score_tile(classes: int, dtype: torch.dtype) -> dict[str, int]:
    depth, stages = (32, 3) if dtype == torch.float32 else (64, 4)
    block_c = min(max(triton.next_power_of_2(classes), 16), 64)  # 150 classes make 192 columns
    return {"BLOCK_N": 64, "BLOCK_C": block_c, "BLOCK_D": depth, "num_warps": 4, "num_stages": stages}


def topk_queries(features: Tensor, prototypes: Tensor, bias: Tensor | None, k: int) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, depth), classes = features.shape, len(prototypes)
    queries = features.new_empty(batch, k, depth)
    score = features.new_empty(batch, tokens, dtype=torch.float32)
    tile = score_tile(classes, features.dtype)
    with torch.cuda.device_of(features):
        if score.numel():
            token_score_kernel[(batch * triton.cdiv(tokens, tile["BLOCK_N"]),)](
                features, prototypes, None if bias is None else bias.contiguous(), score,
                tokens, classes, depth, *features.stride(), *prototypes.stride(),
                PRECISION=precision(features.dtype), **tile,
            )  # fmt: skip
        score, index = best_of_rows(score, k, features.dtype)
        if queries.numel():
            gather_rows_kernel[(batch * k,)](
                features, index, queries, k, depth, *features.stride(),
                BLOCK_D=min(triton.next_power_of_2(depth), 1024),
            )  # fmt: skip
    return queries, index, score


LIBRARY.impl("topk_queries.triton", topk_queries, "CompositeExplicitAutograd")
