"""Triton implementation of fastcss::class_affinity_backward: the fused kernel of affinity_attention does the affinity
map's part, cuBLAS the products with the class centres, which are 12·N·D·C of the FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor

from .._schema import LIBRARY
from .affinity_attention_backward import affinity_attention_backward


def class_affinity_backward(
    dintra: Tensor,
    dinter: Tensor,
    q: Tensor,
    k: Tensor,
    feats: Tensor,
    centers: Tensor,
    tp: Tensor,
    scale: float,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go back through the mean of the centres and its softmax, the affinity map, and the scores P = feats centersᵀ."""
    with torch.cuda.device_of(q):
        scores = torch.bmm(feats, centers.transpose(1, 2))  # [B, N, C]
        half = 0.5 / max(feats.shape[1], 1) if mean else 0.5
        total = scores.sum(dim=1, keepdim=True, dtype=torch.float32)
        dcenters, dlogits = torch.zeros_like(centers), []
        for logits, dout in (((total + tp) * half, dintra), ((total - tp) * half, dinter)):
            weights = logits.softmax(dim=2)
            dweights = torch.bmm(dout, centers.transpose(1, 2))
            dlogits.append((weights * (dweights - (weights * dweights).sum(dim=2, keepdim=True))).to(q.dtype))
            dcenters.baddbmm_(weights.to(q.dtype).transpose(1, 2), dout)
        dq, dk, dscores = affinity_attention_backward(*dlogits, q, k, scores, scale, mean)
        return dq, dk, torch.bmm(dscores, centers), dcenters.baddbmm_(dscores.transpose(1, 2), feats)


LIBRARY.impl("class_affinity_backward.triton", class_affinity_backward, "CompositeExplicitAutograd")
