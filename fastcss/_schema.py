"""Every raw op's schema and fake kernel, once. Imports torch only, so the package works where nothing is compiled.

One op has one overload an implementation (``fastcss::multi_lora.cpu``, ``.triton``, …): the graph of a compiled model
names the kernel that runs, and an explicit ``impl=`` can never be rerouted by the dispatcher.
"""

from __future__ import annotations

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastcss", "DEF")
COMPILED = ("cpu", "cuda", "triton")


def _define(name: str, signature: str, fake) -> None:
    for impl in COMPILED:
        LIBRARY.define(f"{name}.{impl}{signature}", tags=(torch.Tag.needs_fixed_stride_order,))
        torch.library.register_fake(f"fastcss::{name}.{impl}", fake, lib=LIBRARY)


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


_define("multi_lora", _MULTI_LORA, _multi_lora_fake)

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


_define("multi_lora_backward", _MULTI_LORA_BACKWARD, _multi_lora_backward_fake)


# intra = M V and inter = (1 − M) V with M = sigmoid(scale · q kᵀ), both divided by N where `mean`. q, k [B, N, K],
# v [B, N, D]; the results have the shape and dtype of v.
_AFFINITY_ATTENTION = "(Tensor q, Tensor k, Tensor v, float scale, bool mean) -> (Tensor intra, Tensor inter)"


def _affinity_attention_fake(q, k, v, scale, mean) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape), v.new_empty(v.shape)


_define("affinity_attention", _AFFINITY_ATTENTION, _affinity_attention_fake)

_AFFINITY_ATTENTION_BACKWARD = (
    "(Tensor dintra, Tensor dinter, Tensor q, Tensor k, Tensor v, float scale, bool mean) "
    "-> (Tensor dq, Tensor dk, Tensor dv)"
)


def _affinity_attention_backward_fake(dintra, dinter, q, k, v, scale, mean) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_define("affinity_attention_backward", _AFFINITY_ATTENTION_BACKWARD, _affinity_attention_backward_fake)

# feats [B, N, D], centers [B, C, D]; with P = feats centersᵀ, intra and inter [B, N, D] are
# softmax(½ (Σ_n P ± T P)) centers. tp = T P [B, N, C] float32, T = tanh(½ scale · q kᵀ), is what the backward pass
# wants of it; empty unless save_tp.
_CLASS_AFFINITY = (
    "(Tensor q, Tensor k, Tensor feats, Tensor centers, float scale, bool mean, bool save_tp) "
    "-> (Tensor intra, Tensor inter, Tensor tp)"
)


def _class_affinity_fake(q, k, feats, centers, scale, mean, save_tp) -> tuple[Tensor, Tensor, Tensor]:
    tp = (*feats.shape[:2], centers.shape[1]) if save_tp else (0,)
    return feats.new_empty(feats.shape), feats.new_empty(feats.shape), feats.new_empty(tp, dtype=torch.float32)


_define("class_affinity", _CLASS_AFFINITY, _class_affinity_fake)

_CLASS_AFFINITY_BACKWARD = (
    "(Tensor dintra, Tensor dinter, Tensor q, Tensor k, Tensor feats, Tensor centers, Tensor tp, "
    "float scale, bool mean) -> (Tensor dq, Tensor dk, Tensor dfeats, Tensor dcenters)"
)


def _class_affinity_backward_fake(
    dintra, dinter, q, k, feats, centers, tp, scale, mean
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(t.new_empty(t.shape) for t in (q, k, feats, centers))


_define("class_affinity_backward", _CLASS_AFFINITY_BACKWARD, _class_affinity_backward_fake)

# labels int32 [B, N]. loss: float32 scalar, the mean over the pairs whose two pixels are not ignored; 0 without any.
_AFFINITY_LOSS = "(Tensor q, Tensor k, Tensor labels, float scale, int ignore_index) -> Tensor"


def _affinity_loss_fake(q, k, labels, scale, ignore_index) -> Tensor:
    return q.new_empty((), dtype=torch.float32)


_define("affinity_loss", _AFFINITY_LOSS, _affinity_loss_fake)

_AFFINITY_LOSS_BACKWARD = (
    "(Tensor dloss, Tensor q, Tensor k, Tensor labels, float scale, int ignore_index) -> (Tensor dq, Tensor dk)"
)


def _affinity_loss_backward_fake(dloss, q, k, labels, scale, ignore_index) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


_define("affinity_loss_backward", _AFFINITY_LOSS_BACKWARD, _affinity_loss_backward_fake)

# logits [B, C, N], feats [B, N, D] → centers float32 [B, C, D] = Σ_n w_cn f_n, w = exp(logits − pixel_lse − class_lse):
# pixel_lse [B, N] is Σ over the classes where over_classes (else empty, 0), class_lse [B, C] then over the pixels.
_CLASS_CENTERS = (
    "(Tensor logits, Tensor feats, bool over_classes) -> (Tensor centers, Tensor class_lse, Tensor pixel_lse)"
)


def _class_centers_fake(logits, feats, over_classes) -> tuple[Tensor, Tensor, Tensor]:
    batch, classes, pixels = logits.shape
    class_lse = logits.new_empty((batch, classes), dtype=torch.float32)
    pixel_lse = logits.new_empty((batch, pixels) if over_classes else (0,), dtype=torch.float32)
    centers = feats.new_empty((batch, classes, feats.shape[2]), dtype=torch.float32)
    return centers, class_lse, pixel_lse


_define("class_centers", _CLASS_CENTERS, _class_centers_fake)

_CLASS_CENTERS_BACKWARD = (
    "(Tensor dcenters, Tensor logits, Tensor feats, Tensor centers, Tensor class_lse, Tensor pixel_lse) "
    "-> (Tensor dlogits, Tensor dfeats)"
)


def _class_centers_backward_fake(dcenters, logits, feats, centers, class_lse, pixel_lse) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape), feats.new_empty(feats.shape)


_define("class_centers_backward", _CLASS_CENTERS_BACKWARD, _class_centers_backward_fake)
