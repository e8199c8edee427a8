import math

import torch
from torch import Tensor

from ._library import raw_op


def _flops(x, weight, bias, lora_a, lora_b, offsets, scales, index, max_rank, save_h) -> int:
    width_out, width_in = weight
    base_rows = math.prod(x[:-1])
    slot_rows = (scales if index is None else index)[0] * x[-2]
    rank_rows = x[-2] * lora_a[0] if index is None else slot_rows * max_rank
    return 2 * (base_rows * width_in * width_out + rank_rows * (width_in + width_out))


# Slots: with index=None slot s is adapter s, otherwise adapter index[s] (-1: none). x is [M, K], the same for all
# slots, or [S, M, K]. h holds scale · x Aᵀ for the backward pass where save_h asks for it, else it is empty: [M, Σr] in
# the packed order with index=None, else [S, M, max_rank].
@raw_op(
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor offsets, Tensor scales, "
    "Tensor? index, int max_rank, bool save_h) -> (Tensor y, Tensor h)",
    flops=_flops,
)
def multi_lora(x, weight, bias, lora_a, lora_b, offsets, scales, index, max_rank, save_h) -> tuple[Tensor, Tensor]:
    slots = scales.shape[0] if index is None else index.shape[0]
    rows = x.shape[-2]
    y = x.new_empty(slots, rows, weight.shape[0])
    hidden = (rows, lora_a.shape[0]) if index is None else (slots, rows, max_rank)
    return y, x.new_empty(hidden if save_h else (0,), dtype=torch.float32)


def _backward_flops(dy, x, weight, lora_a, lora_b, offsets, scales, index, h, max_rank, need_dx, need_dlora) -> int:
    width_out, width_in = weight
    rank_rows = x[-2] * lora_a[0] if index is None else dy[0] * dy[1] * max_rank
    flops = rank_rows * width_out  # dy Bᵀ, which both results need
    if need_dx:
        flops += math.prod(x[:-1]) * width_in * width_out + rank_rows * width_in
    if need_dlora:
        flops += rank_rows * (width_in + width_out)
    return 2 * flops


# dx [M, K] or [S, M, K] like x, dlora_a [Σr, K], dlora_b [Σr, N] in the adapters' dtype; what need_* turns off is
# empty. h is what the forward pass saved, or empty: then it is computed again.
@raw_op(
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor offsets, Tensor scales, "
    "Tensor? index, Tensor h, int max_rank, bool need_dx, bool need_dlora) "
    "-> (Tensor dx, Tensor dlora_a, Tensor dlora_b)",
    flops=_backward_flops,
)
def multi_lora_backward(
    dy, x, weight, lora_a, lora_b, offsets, scales, index, h, max_rank, need_dx, need_dlora
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dlora_a = lora_a.new_empty(lora_a.shape if need_dlora else (0,))
    dlora_b = lora_b.new_empty(lora_b.shape if need_dlora else (0,))
    return dx, dlora_a, dlora_b
