"""Cases of ``relative_attention``: a layer of SAM's ViT-B on its map of 64², of the whole map and in windows of 14.

As in ``window_attention``, peers are given keys and values in windows from the start, and bring only the queries there,
in place of the model's normed map; the filling tokens' keys and values are constants on both sides. Mode "bwd" is a
training step's share: forward, then the gradients of q, k, v, which stay in windows if they came in windows, and of
both tables.

"eager" and "sdpa" are transformers' own arithmetic, which writes out the bias of N × N. "sdpa, mask given" has that
made beforehand and so does less than the others, as a bound. "flex" computes the bias of a score from its two numbers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcss.ops import relative_attention

from . import _steps
from .cases import Case, Problem, Step, largest_error

# Errors are relative to the largest expected value. float32 adds up as many as 4096 rounded products; a table's
# gradient sums over all queries. bfloat16 has 8 bits for the scores, and for the attention where it is in memory.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
SOURCES = ("fastcss/_ops/relative_attention.py", "fastcss/composed/relative_attention.py")


def cases(device: str, quick: bool) -> list[Case]:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found = []
    for name, window in (("global-64x64", None), ("windows-14", 14)):
        shape = {"B": 1, "H": 64, "W": 64, "heads": 12, "D": 64, "window": window}
        if quick:  # 5 is no divisor of the map's sides, as 14 is none of 64
            shape |= {"H": 12, "W": 9, "heads": 2, "D": 16, "window": window and 5}
        build = functools.partial(_problem, shape, dtype, quick)
        name = f"relative_attention/{name}" + "-quick" * quick
        found.append(Case("relative_attention", name, shape, dtype, build, SOURCES))
    return found


def _problem(shape: dict, dtype: torch.dtype, quick: bool, device: str, mode: str) -> Problem:
    layer = Layer.random(shape, dtype, device)

    def ours(impl: str) -> Step:
        return _steps.step_of(layer.op(impl), layer.tensors, [layer.gradient], mode)

    providers: dict[str, Callable[[], Step]] = {
        "fastcss": lambda: ours("auto"),
        "eager": lambda: layer.model_step(_eager, mode),
        "sdpa": lambda: layer.model_step(_sdpa, mode),
    }
    if mode == "fwd":
        providers["sdpa, mask given"] = layer.masked_step
    if not quick:
        providers["compiled"] = lambda: layer.model_step(_eager, mode, compiled=True)
        if device == "cuda" or mode == "fwd":  # a CPU's has no backward pass
            providers["flex"] = lambda: layer.model_step(_flex, mode)
    if device == "cuda":
        providers["composed"] = lambda: ours("composed")
        providers["triton"] = lambda: ours("triton")

    def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        """Merge gradients that are in windows, and compare."""
        maps = [
            layer.merged(a).view(b.shape) if b.dim() == 5 and a.shape != b.shape and a.dim() == 5 else a
            for a, b in zip(got, expected, strict=False)
        ]
        return largest_error(maps, expected) if len(got) == len(expected) else float("inf")

    work_ = work(shape, dtype.itemsize, mode)
    return Problem(providers, lambda: layer.expected(mode), TOLERANCE[dtype], *work_, error)


@dataclasses.dataclass
class Layer:
    """Holds one layer's inputs.

    Attributes:
        block: transformers' SamVisionLayer, whose windows and bias the peers run.
        tensors: q, k and v, [B, H, W, heads, D], views of one projection, and both tables, [2 S − 1, D].
        pads: key and value of the tokens that fill up, [heads, D].
        gradient: of the output, [B, H, W, heads · D].
    """

    block: nn.Module
    tensors: list[Tensor]
    pads: list[Tensor]
    gradient: Tensor

    @classmethod
    def random(cls, shape: dict, dtype: torch.dtype, device: str) -> Layer:
        from transformers import SamVisionConfig
        from transformers.models.sam.modeling_sam import SamVisionLayer

        normal = functools.partial(_steps.normal, dtype=dtype, device=device)
        batch, height, width, heads, channels, window = shape.values()
        config = SamVisionConfig(hidden_size=heads * channels, num_attention_heads=heads)
        config._attn_implementation = "eager"
        qkv = normal(batch, height, width, 3, heads, channels)
        spans = (window, window) if window else (height, width)
        # With these tables the bias is as large as the products of q and k.
        tables = [normal(2 * span - 1, channels, scale=channels**-0.5) for span in spans]
        pads = [normal(heads, channels) for _ in "kv"]
        gradient = normal(batch, height, width, heads * channels)
        return cls(SamVisionLayer(config, window or 0), [*qkv.unbind(3), *tables], pads, gradient)

    @property
    def window(self) -> int | None:
        return self.block.window_size or None

    @property
    def size(self) -> tuple[int, int]:
        return tuple(self.tensors[0].shape[1:3])

    def op(self, impl: str) -> Callable[..., tuple[Tensor]]:
        def forward(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor]:
            pads = dict(zip(("pad_key", "pad_value"), (pad.to(q.dtype) for pad in self.pads), strict=True))
            return (relative_attention(q, k, v, rel_h, rel_w, window=self.window, impl=impl, **pads),)

        return forward

    def expected(self, mode: str) -> Sequence[Tensor]:
        """Compute the reference in float64, a head at a time: all heads' maps of N × N would be gigabytes."""
        results = []
        for head in range(self.pads[0].shape[0]):
            part = slice(head, head + 1)
            one = Layer(self.block, [x[..., part, :] for x in self.tensors[:3]] + self.tensors[3:], self.pads, None)
            one.pads = [pad[part] for pad in self.pads]
            gradient = self.gradient.unflatten(3, (-1, self.pads[0].shape[1]))[..., head, :]
            results.append(_steps.expected(one.op("reference"), one.tensors, [gradient], mode))
        out, *gradients = zip(*results, strict=True)
        maps, tables = gradients[:3], gradients[3:]
        return torch.cat(out, 3), *(torch.cat(of, 3) for of in maps), *(sum(of) for of in tables)

    def model_step(self, attend: Callable[..., Tensor], mode: str, compiled: bool = False) -> Step:
        """Make a step of transformers' arithmetic: q comes as a map; k and v in windows, if there are any."""

        def forward(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> tuple[Tensor]:
            q, k, v = (x.transpose(2, 3).transpose(1, 2) for x in (self.partitioned(q), k, v))  # heads before H, W
            return (self.merged(attend(self.block.attn, q, k, v, rel_h, rel_w)),)

        q, k, v, *tables = self.tensors
        windows = [self.partitioned(x, pad).contiguous() for x, pad in zip((k, v), self.pads, strict=True)]
        forward = torch.compile(forward, dynamic=False, fullgraph=True) if compiled else forward
        return _steps.step_of(forward, (q, *windows, *tables), [self.gradient], mode)

    def masked_step(self) -> Step:
        q, *_, rel_h, rel_w = self.tensors
        mask = _mask(self.block.attn, self.partitioned(q).transpose(2, 3).transpose(1, 2), rel_h, rel_w)

        def attend(_: nn.Module, q: Tensor, k: Tensor, v: Tensor, *tables: Tensor) -> Tensor:
            return _with_mask(q, k, v, mask)

        return self.model_step(attend, "fwd")

    def partitioned(self, x: Tensor, pad: Tensor | None = None) -> Tensor:
        """Partition [B, H, W, heads, D] → [windows, S, S, heads, D]; ``pad`` are the filling tokens, by default 0."""
        if not self.window:
            return x
        height, width = (size + -size % self.window for size in self.size)
        if pad is not None:
            filled = pad.expand(x.shape[0], height, width, -1, -1).clone()
            filled[:, : x.shape[1], : x.shape[2]] = x
            x = filled
        return self.block.window_partition(x.flatten(3), self.window)[0].unflatten(3, x.shape[3:])

    def merged(self, x: Tensor) -> Tensor:
        """Merge [windows, S, S, heads, D] → [B, H, W, heads · D]."""
        if not self.window:
            return x.flatten(3)
        padded = tuple(size + -size % self.window for size in self.size)
        return self.block.window_unpartition(x.flatten(3), self.window, padded, self.size)


def work(shape: dict, itemsize: int, mode: str) -> tuple[float, float]:
    """Count FLOPs, and the bytes of q, k, v, the output and the tables in and out of memory.

    The forward pass has the scores and the sums of each token's window or map, and a query's products with both
    tables. The backward pass has two products for each of these; what it may compute again does not count.
    """
    batch, height, width, heads, channels, window = shape.values()
    spans = (window, window) if window else (height, width)
    values = batch * height * width * heads * channels
    tables = sum(2 * span - 1 for span in spans) * channels
    flops = 4 * values * spans[0] * spans[1] + 2 * values * sum(spans)
    if mode == "fwd":
        return flops, (4 * values + tables) * itemsize
    return 3 * flops, ((3 * 3 + 2) * values + 3 * tables) * itemsize


def _eager(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Compute ``SamVisionAttention.forward`` between its linear layers: q, k, v [windows, heads, S, S, D]."""
    shape = q.shape
    query, key, value = (x.reshape(-1, shape[2] * shape[3], shape[4]) for x in (q, k, v))
    weights = (query * shape[4] ** -0.5) @ key.transpose(1, 2)
    bias = attention.get_decomposed_rel_pos(query, rel_h, rel_w, shape[2:4], shape[2:4])
    weights = F.softmax(weights + bias.reshape_as(weights), dtype=torch.float32, dim=-1).to(query.dtype)
    return (weights @ value).view(shape).permute(0, 2, 3, 1, 4)


def _sdpa(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    return _with_mask(q, k, v, _mask(attention, q, rel_h, rel_w))


def _mask(attention: nn.Module, q: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    """Write out the bias of every score, [windows, heads, N, N]."""
    size = q.shape[2:4]
    bias = attention.get_decomposed_rel_pos(q.flatten(2, 3).flatten(0, 1), rel_h, rel_w, size, size)
    return bias.reshape(*q.shape[:2], size[0] * size[1], size[0] * size[1])


def _with_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    shape = q.shape
    q, k, v = (x.flatten(2, 3) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(shape).permute(0, 2, 3, 1, 4)


def _flex(attention: nn.Module, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor, rel_w: Tensor) -> Tensor:
    shape = q.shape
    at = [attention.get_rel_pos(size, size, table) for size, table in zip(shape[2:4], (rel_h, rel_w), strict=True)]
    rows = torch.einsum("bnhwc,hkc->bnhwk", q, at[0]).flatten(2, 3)  # [windows, heads, N, S]
    columns = torch.einsum("bnhwc,wkc->bnhwk", q, at[1]).flatten(2, 3)
    q, k, v = (x.flatten(2, 3).contiguous() for x in (q, k, v))
    return _compiled_flex()(q, k, v, rows, columns, shape[3]).view(shape).permute(0, 2, 3, 1, 4)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor, width: int) -> Tensor:
        def biased(score: Tensor, b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + rows[b, head, i, j // width] + columns[b, head, i, j % width]

        return flex_attention(q, k, v, score_mod=biased)

    return torch.compile(attend, dynamic=False, fullgraph=True)
