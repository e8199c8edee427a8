"""Triton implementation of fastcss::bi_attention.

Both sides use one kernel, in which rows read keys: image tokens read the text, and text tokens read the image, whose
many keys are split among programs. q is read twice, and v_image, k and v_text once, or from L2; logits never leave the
registers. Take N image tokens of D = 256 in bf16 on a GPU of 4.3 TB/s and 600 TFLOP/s: a head's row of the image side
moves 1 KiB of q and of the output and takes 1024 L FLOP, so memory is the limit up to L ≈ 140.

The model subtracts the peak from the logits, and bounds the difference from below by LEAST. A softmax does not depend
on that peak, unless a logit is below the bound, and only the end of the sweep tells whether one is. So the first
launches apply no bound and write each program's largest and smallest logit. The programs of the second launches find
the peak of their samples in those, do all of it again with the bound if some logit is below it, and return otherwise:
nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._dispatch.private_apis import gpu_architecture
from .._schema import LIBRARY
from .affinity_tiles import MULTIPROCESSORS
from .bi_attention_device import BOUND, bounded, combine_kernel, load_read, load_rows, peak_of, place_of, products
from .class_centers import exp, finite_or_zero
from .cost_filter import largest, nan_or_larger
from .multi_lora import _operands_stay_in_shared_memory, precision
from .multi_lora_device import dot, store_tile
from .tuned import tuned

MAX_WIDTH = 256  # a head's row is one operand tile
MAX_STRIDE = 2**24  # times a tile's rows this still fits in 32 bits


@triton.jit
def _attend(
    x, y, v, mask, out, stats, extremes, extremes_low, peak, row, first, last, R, K, width, stride_xr, stride_yk,
    stride_vk, scale,
    CLAMP: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """softmax(scale · x yᵀ) v of a row block over the keys first..last.

    Its stats are the largest logit and Σ exp(logit − largest), or the logarithm of that sum if these are all keys
    (WHOLE).
    """
    rows = row + tl.arange(0, BLOCK_R)
    x_tile = load_rows(x, row, R, stride_xr, D, BLOCK_R, BLOCK_D)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    highest = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    most = tl.full([BLOCK_R], float("-inf"), tl.float32)
    least = tl.full([BLOCK_R], float("-inf"), tl.float32)  # the smallest logit with its sign changed
    for key in range(first, last, BLOCK_K):
        y_tile = load_rows(y, key, K, stride_yk, D, BLOCK_K, BLOCK_D)
        s = products(x, y, x_tile, y_tile, row, key, R, K, stride_xr, stride_yk, D, CHUNK, PRECISION) * scale
        there = key + tl.arange(0, BLOCK_K) < last
        if extremes is not None:
            most = nan_or_larger(most, largest(tl.where(there[None, :], s, float("-inf")), 1))
            least = nan_or_larger(least, largest(tl.where(there[None, :], -s, float("-inf")), 1))
        if CLAMP:
            s = bounded(s, peak, BOUND)
        s = tl.where(load_read(mask, key, last, BLOCK_K)[None, :], s, float("-inf"))
        higher = tl.maximum(highest, tl.max(s, 1))
        shift = finite_or_zero(higher)
        p = exp(s - shift[:, None])
        decay = exp(highest - shift)
        total = total * decay + tl.sum(p, 1)
        v_tile = load_rows(v, key, K, stride_vk, D, BLOCK_K, BLOCK_D)
        acc = dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], PRECISION)
        highest = higher
    store_tile(out, acc / total[:, None], row, 0, R, D, width)
    tl.store(stats + rows * 2, highest, mask=rows < R)
    tl.store(stats + rows * 2 + 1, tl.log(total) if WHOLE else total, mask=rows < R)
    if extremes is not None:
        tl.store(extremes, largest(tl.where(rows < R, most, float("-inf")), 0))
        tl.store(extremes_low, largest(tl.where(rows < R, least, float("-inf")), 0))


@triton.jit(do_not_specialize=["batches"])
def attend_kernel(
    x, y, v, mask, out, stats, extremes, floor,
    R, K, batches, heads, group, splits, split_keys, counts,
    stride_xb, stride_xr, stride_xh, stride_yb, stride_yk, stride_yh, stride_vb, stride_vk, stride_vh,
    scale,
    CLAMP: tl.constexpr, WHOLE: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [splits, B, R, heads, D] and stats [splits, B, heads, R, 2] of rows x that read the values v of keys y.

    The first launch writes extremes [2, B, counts], if they are given. With CLAMP they are read: if a logit of the
    group is more than −LEAST below its peak, all is done again; floor [B, 2] says for which samples.
    """
    batch, head, split, block = place_of(R, heads, splits, BLOCK_R)
    head64 = tl.cast(head, tl.int64)
    row = block * BLOCK_R
    first = split * split_keys
    last = min(first + split_keys, K)
    x += batch * stride_xb + head64 * stride_xh
    y += batch * stride_yb + head64 * stride_yh
    v += batch * stride_vb + head64 * stride_vh
    if mask is not None:
        mask += batch * K
    width = heads * D
    out += (tl.cast(split, tl.int64) * batches + batch) * R * width + head64 * D
    stats += ((tl.cast(split, tl.int64) * batches + batch) * heads + head) * R * 2
    if CLAMP:
        of_group = batch // group * group * counts
        highest, lowest = peak_of(extremes, of_group, group * counts, tl.cast(batches, tl.int64) * counts)
        bites = (highest + lowest <= -BOUND) == 0
        if (head == 0) & (block == 0):
            tl.store(floor + batch * 2, tl.where(bites, highest, 0.0))
            tl.store(floor + batch * 2 + 1, tl.where(bites, BOUND, float("-inf")))
        if bites:
            _attend(
                x, y, v, mask, out, stats, None, None, highest, row, first, last, R, K, width, stride_xr,
                stride_yk, stride_vk, scale, CLAMP, WHOLE, D, PRECISION, CHUNK, BLOCK_R, BLOCK_K, BLOCK_D,
            )  # fmt: skip
    else:
        low = extremes
        if extremes is not None:
            extremes += batch * counts + head * tl.cdiv(R, BLOCK_R) + block
            low = extremes + tl.cast(batches, tl.int64) * counts
        _attend(
            x, y, v, mask, out, stats, extremes, low, 0.0, row, first, last, R, K, width, stride_xr, stride_yk,
            stride_vk, scale, CLAMP, WHOLE, D, PRECISION, CHUNK, BLOCK_R, BLOCK_K, BLOCK_D,
        )  # fmt: skip


@tuned("BLOCK_R", "BLOCK_K")
def forward_tile(rows: int, keys: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Choose the tile for this many rows and keys."""
    block_d = max(triton.next_power_of_2(width), 16)
    few = max(triton.next_power_of_2(min(rows, keys)), 16)
    if dtype == torch.float32:
        r, k, warps, stages, chunk = 16, 16, 8, 1, min(block_d, 32)
    elif not _operands_stay_in_shared_memory():
        r, k, warps, stages, chunk = 64, 32, 8, 2, 0
    elif few <= 64:  # two programs on a multiprocessor
        r, k, warps, stages, chunk = 32, 32, 4, 3, 0
    elif gpu_architecture() < 100:
        r, k, warps, stages, chunk = 128, 64, 8, 2, 0
    else:  # Blackwell keeps the accumulator elsewhere, and passes it through registers to scale it
        r, k, warps, stages, chunk = 128, 32, 8, 3, 0
    r = min(r, max(triton.next_power_of_2(rows), 16))
    return {
        "BLOCK_R": r, "BLOCK_K": k, "BLOCK_D": block_d, "CHUNK": chunk, "PRECISION": precision(dtype),
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def keys_of_split(rows: int, keys: int, heads: int, tile: dict[str, int]) -> int:
    """Return how many keys one program takes, so that one sample fills the multiprocessors without a second wave."""
    slots = MULTIPROCESSORS * (2 if tile["num_warps"] == 4 else 1)
    splits = max(slots // (heads * triton.cdiv(rows, tile["BLOCK_R"])), 1)
    return triton.cdiv(triton.cdiv(keys, tile["BLOCK_K"]), splits) * tile["BLOCK_K"]


def readable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors [B, tokens, heads, D] as they are, or copies of those that load_rows cannot read."""
    return tuple(x if x.stride(3) == 1 and x.stride(1) < MAX_STRIDE else x.contiguous() for x in tensors)


def check_width(q: Tensor) -> None:
    if q.shape[3] > MAX_WIDTH:
        raise ValueError(f"bi_attention: impl='triton' takes heads of up to {MAX_WIDTH} columns, got {q.shape[3]}")


class Side:
    """Launches one side, rows that read keys; its two launches differ in CLAMP alone."""

    def __init__(self, x: Tensor, y: Tensor, v: Tensor, mask: Tensor | None, split: bool):
        (batch, rows, heads, width), keys = x.shape, y.shape[1]
        self.operands, self.rows, self.keys = (x, y, v, mask), rows, keys
        self.tile = forward_tile(rows, keys, width, x.dtype)
        self.split_keys = keys_of_split(rows, keys, heads, self.tile) if split else keys
        self.splits = triton.cdiv(keys, self.split_keys)
        self.blocks = triton.cdiv(rows, self.tile["BLOCK_R"])
        dtype = torch.float32 if self.splits > 1 else x.dtype
        self.out = x.new_empty((self.splits, batch, rows, heads * width), dtype=dtype)
        self.stats = x.new_empty((self.splits, batch, heads, rows, 2), dtype=torch.float32)

    def launch(self, extremes: Tensor | None, floor: Tensor | None, group: int, scale: float, clamp: bool) -> None:
        x, y, v, mask = self.operands
        (batch, rows, heads, width), keys = x.shape, y.shape[1]
        counts = 0 if extremes is None else extremes.shape[2]
        attend_kernel[(batch * heads * self.splits * self.blocks,)](
            x, y, v, mask, self.out, self.stats, extremes, floor,
            rows, keys, batch, heads, group, self.splits, self.split_keys, counts,
            *x.stride()[:3], *y.stride()[:3], *v.stride()[:3], scale,
            CLAMP=clamp, WHOLE=self.splits == 1, D=width, **self.tile,
        )  # fmt: skip

    def result(self) -> tuple[Tensor, Tensor]:
        """Return out [B, R, heads · D] and stats [B, heads, R, 2]."""
        if self.splits == 1:
            return self.out[0], self.stats[0]
        x = self.operands[0]
        batch, rows, heads, width = x.shape
        out, stats = x.new_empty(self.out.shape[1:]), self.stats.new_empty(self.stats.shape[1:])
        combine_kernel[(batch * rows * heads,)](
            self.out, self.stats, out, stats, rows, width, batch, heads, self.splits,
            BLOCK_S=16, BLOCK_D=self.tile["BLOCK_D"], num_warps=4,
        )  # fmt: skip
        return out, stats


def bi_attention(
    q: Tensor, k: Tensor, v_image: Tensor, v_text: Tensor, text_mask: Tensor | None, image_mask: Tensor | None,
    scale: float, group: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    check_width(q)
    batch, pixels, heads, width = q.shape
    length = k.shape[1]
    floor = q.new_zeros((batch, 2), dtype=torch.float32)
    if not (q.numel() and k.numel()):
        out = (q.new_zeros(batch, tokens, heads * width) for tokens in (pixels, length))
        return *out, *(floor.new_zeros(batch, heads, tokens, 2) for tokens in (pixels, length)), floor
    q, k, v_image, v_text = readable(q, k, v_image, v_text)
    text_mask, image_mask = (None if mask is None else mask.contiguous() for mask in (text_mask, image_mask))
    image, text = Side(q, k, v_text, text_mask, split=False), Side(k, q, v_image, image_mask, split=True)
    extremes = floor.new_empty(2, batch, heads * image.blocks)
    with torch.cuda.device_of(q):
        image.launch(extremes, None, group, scale, clamp=False)
        text.launch(None, None, group, scale, clamp=False)
        image.launch(extremes, floor, group, scale, clamp=True)
        text.launch(extremes, floor, group, scale, clamp=True)
        (image, image_stats), (text, text_stats) = image.result(), text.result()
    return image, text, image_stats, text_stats, floor


LIBRARY.impl("bi_attention.triton", bi_attention, "CompositeExplicitAutograd")
