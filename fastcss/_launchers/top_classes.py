from __future__ import annotations

import torch
from torch import Tensor

from .._dispatch.nvrtc import blocks, constant, launch, launcher


@launcher
def top_classes(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    file, (batch, classes) = "top_classes.cuh", score.shape
    values, index = score.new_empty(batch, k), score.new_empty((batch, k), dtype=torch.int64)
    grid = (batch, blocks(k, constant(file, "kBlockRanks")))
    launch(file, "top_classes", score.dtype, grid, score, *score.stride(), classes, k, values, index)
    return values, index
