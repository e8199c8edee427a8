"""Has arguments that every op takes, and checks what is said when one of them is changed."""

from __future__ import annotations

import re

import pytest
import torch

from fastcss import ops

ARGUMENTS = {
    "affinity_attention": {"q": torch.ones(2, 4, 3), "k": torch.ones(2, 4, 3), "v": torch.ones(2, 4, 5)},
    "class_affinity": {
        "q": torch.ones(2, 4, 3),
        "k": torch.ones(2, 4, 3),
        "feats": torch.ones(2, 4, 5),
        "centers": torch.ones(2, 6, 5),
    },
    "affinity_loss": {
        "q": torch.ones(2, 4, 3),
        "k": torch.ones(2, 4, 3),
        "labels": torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]),
    },
    "class_centers": {"logits": torch.ones(2, 3, 4), "feats": torch.ones(2, 4, 5)},
    "cost_filter": {"image": torch.ones(2, 3, 4, 5), "text": torch.ones(6, 2, 5), "k": 3},
    "phrase_pool": {"cls": torch.ones(2, 5), "phrases": torch.ones(3, 4, 5)},
    "select_tokens": {
        "tokens": torch.ones(2, 4, 5),
        "classes": torch.ones(2, 3, 5),
        "threshold": 0.3,
        "length": 7,
    },
    "prompt_mlp": {
        "z": torch.ones(2, 5),
        "w1": torch.ones(3, 5, 4),
        "b1": torch.ones(3, 4),
        "w2": torch.ones(3, 4, 6),
        "b2": torch.ones(3, 6),
        "index": torch.tensor([2, -1]),
    },
    "merge_masks": {"masks": torch.ones(3, 4, 5), "scores": torch.ones(3), "size": (7, 9)},
    "topk_queries": {
        "features": torch.ones(2, 4, 5),
        "prototypes": torch.ones(3, 5),
        "k": 2,
        "bias": torch.ones(3),
    },
    "top_margin": {"logits": torch.ones(2, 3, 4), "labels": torch.tensor([[0, 1, 2, 0], [1, 2, 0, 255]])},
    "deformable_attention": {
        "value": torch.ones(2, 8, 3, 5),
        "spatial_shapes": [(2, 3), (1, 2)],
        "reference_points": torch.ones(2, 4, 2, 2),
        "offsets": torch.ones(2, 4, 3, 2, 6, 2),
        "logits": torch.ones(2, 4, 3, 2, 6),
    },
    "bi_attention": {
        "q": torch.ones(2, 4, 3, 5),
        "k": torch.ones(2, 6, 3, 5),
        "v_image": torch.ones(2, 4, 3, 5),
        "v_text": torch.ones(2, 6, 3, 5),
    },
    "window_attention": {
        "q": torch.ones(2, 4, 6, 3, 5),
        "k": torch.ones(2, 4, 6, 3, 5),
        "v": torch.ones(2, 4, 6, 3, 5),
        "bias": torch.ones(3, 4, 4),
        "window": 2,
        "pad_key": torch.ones(3, 5),
        "pad_value": torch.ones(3, 5),
    },
    "relative_attention": {
        "q": torch.ones(2, 4, 6, 3, 5),
        "k": torch.ones(2, 4, 6, 3, 5),
        "v": torch.ones(2, 4, 6, 3, 5),
        "rel_h": torch.ones(5, 5),
        "rel_w": torch.ones(5, 5),
        "window": 3,
        "pad_key": torch.ones(3, 5),
        "pad_value": torch.ones(3, 5),
    },
}


def refused(op: str, kind: type[Exception], message: str, **changes) -> None:
    with pytest.raises(kind, match=f"^{op}: {re.escape(message)}"):
        getattr(ops, op)(**ARGUMENTS[op] | changes)
