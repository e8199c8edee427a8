import torch
from torch import Tensor

from ._library import define

# Slots: with index=None slot s is adapter s, otherwise adapter index[s] (-1: none). x is [M, K], the same for all
# slots, or [S, M, K]. h holds scale · x Aᵀ for the backward pass where save_h asks for it, else it is empty: [M, Σr] in
# the packed order with index=None, else [S, M, max_rank].
_MULTI_LORA = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor offsets, Tensor scales, "
    "Tensor? index, int max_rank, bool save_h) -> (Tensor y, Tensor h)"
)


def _multi_lora_fake(
    x, weight, bias, lora_a, lora_b, offsets, scales, index, max_rank, save_h
) -> tuple[Tensor, Tensor]:
    slots = scales.shape[0] if index is None else index.shape[0]
    rows = x.shape[-2]
    y = x.new_empty(slots, rows, weight.shape[0])
    hidden = (rows, lora_a.shape[0]) if index is None else (slots, rows, max_rank)
    return y, x.new_empty(hidden if save_h else (0,), dtype=torch.float32)


define("multi_lora", _MULTI_LORA, _multi_lora_fake)

# dx [M, K] or [S, M, K] like x, dlora_a [Σr, K], dlora_b [Σr, N] in the adapters' dtype; what need_* turns off is
# empty. h is what the forward pass saved, or empty: then it is computed again.
_MULTI_LORA_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor offsets, Tensor scales, "
    "Tensor? index, Tensor h, int max_rank, bool need_dx, bool need_dlora) "
    "-> (Tensor dx, Tensor dlora_a, Tensor dlora_b)"
)


def _multi_lora_backward_fake(
    dy, x, weight, lora_a, lora_b, offsets, scales, index, h, max_rank, need_dx, need_dlora
) -> tuple[Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if need_dx else (0,))
    dlora_a = lora_a.new_empty(lora_a.shape if need_dlora else (0,))
    dlora_b = lora_b.new_empty(lora_b.shape if need_dlora else (0,))
    return dx, dlora_a, dlora_b


define("multi_lora_backward", _MULTI_LORA_BACKWARD, _multi_lora_backward_fake)
