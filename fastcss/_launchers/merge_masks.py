from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch.nvrtc import blocks, constant, launch, launcher


@launcher
def merge_masks(
    masks: Tensor, scores: Tensor, order: Tensor, height: int, width: int, crop_height: int, crop_width: int,
    threshold: float, want_score: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    file = "merge_masks.cuh"
    labels = masks.new_empty((height, width), dtype=torch.int64)
    score = scores.new_empty((height, width) if want_score else (0,))
    grid = [blocks(size, constant(file, "kTile")) for size in (width, height)]
    launch(
        file, "merge_masks", masks.dtype, grid,
        *(masks, *masks.stride(), *masks.shape, scores, *scores.stride(), scores.element_size()),
        *(order, *order.stride(), height, width, crop_height, crop_width, float(threshold)),
        *(labels, score if want_score else None),
    )  # fmt: skip
    return labels, score
