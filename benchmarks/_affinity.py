"""Gives the cases of the affinity ops what they share: queries and keys, and the affinity map by rows in torch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ._steps import normal

ROWS = (64, 128, 256, 512)


def queries_and_keys(shape: dict, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Draw queries and keys of an affinity map whose logits have a standard deviation of 2."""
    size = (1, shape["N"], shape["K"])
    q = normal(*size, scale=2 * shape["K"] ** -0.5, dtype=dtype, device=device)
    return q, normal(*size, dtype=dtype, device=device)


def exact(pixels: int) -> str:
    """Name the implementation for float64: the equation, or row chunks when the equation's maps would take 10 GiB."""
    return "reference" if pixels <= 8192 else "composed"


def chunk_rows(pixels: int) -> Sequence[int]:
    """List how many rows of the map at a time the chunked forms try."""
    return ROWS if pixels <= 8192 else ROWS[:2]


def complement(product: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the means M V ÷ N and (1 − M) V ÷ N from M V and the column sums, in float32 until the end."""
    intra = product.float() / values.shape[1]
    inter = values.mean(dim=1, keepdim=True, dtype=torch.float32) - intra
    return intra.to(values.dtype), inter.to(values.dtype)


def whole_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute M V with the whole map in memory."""
    return torch.bmm(torch.bmm(q, k.mT).sigmoid(), v)


class ChunkedProduct(torch.autograd.Function):
    """Computes M V with M = sigmoid(Q Kᵀ) for one image, a few rows of the map at a time: the best torch form we know.

    It keeps one buffer for the rows, applies the sigmoid in place (half the time of tanh) and writes products into
    their place; the backward pass computes the rows again.
    """

    @staticmethod
    def forward(ctx, rows: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rows = rows
        out, keys = torch.empty_like(v), k[0].t()
        buffer = q.new_empty(rows, k.shape[1])
        for part, queries in zip(out[0].split(rows), q[0].split(rows), strict=True):
            torch.mm(torch.mm(queries, keys, out=buffer[: len(part)]).sigmoid_(), v[0], out=part)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = (tensor[0] for tensor in ctx.saved_tensors)
        dout, dq = dout[0].to(v.dtype), torch.empty_like(q)
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        buffers = q.new_empty(2, ctx.rows, len(k))
        for first in range(0, len(q), ctx.rows):
            part = slice(first, first + ctx.rows)
            affinity, slope = (buffer[: len(dq[part])] for buffer in buffers)
            torch.mm(q[part], k.t(), out=affinity).sigmoid_()
            torch.mm(dout[part], v.t(), out=slope)
            add_product(dv, affinity.t(), dout[part])
            torch.ops.aten.sigmoid_backward.grad_input(slope, affinity, grad_input=slope)
            torch.mm(slope, k, out=dq[part])
            add_product(dk, slope.t(), q[part])
        return None, dq[None], dk.to(k.dtype)[None], dv.to(v.dtype)[None]


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a product onto a float32 sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += torch.mm(a, b)


def flex_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute M V by FlexAttention, in float32: a softmax over log σ(s), times the sum it was divided by, is σ(s)."""
    out, lse = _flex_attention()(*(t[:, None] for t in (q, k, v)), score_mod=_log_sigmoid, scale=1.0, return_lse=True)
    return out[:, 0].float() * lse[:, 0, :, None].exp()


@functools.cache
def _flex_attention() -> Callable[..., tuple[Tensor, Tensor]]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _log_sigmoid(score, batch, head, query, key):
    return torch.nn.functional.logsigmoid(score)
