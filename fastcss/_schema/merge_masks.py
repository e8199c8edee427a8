import torch
from torch import Tensor

from ._library import raw_op


# masks [K, h, w] are resized bilinearly to [4h, 4w], cut to the top left crop_height × crop_width, resized to height ×
# width. labels int64 [height, width]: 1 + the first mask in `order` (int64 [K], best score first) that is above
# threshold there, or 0. score: its score in the dtype of scores, or 0; empty unless want_score.
@raw_op(
    "(Tensor masks, Tensor scores, Tensor order, SymInt height, SymInt width, SymInt crop_height, SymInt crop_width, "
    "float threshold, bool want_score) -> (Tensor labels, Tensor score)",
    flops=None,
)
def merge_masks(
    masks, scores, order, height, width, crop_height, crop_width, threshold, want_score
) -> tuple[Tensor, Tensor]:
    labels = masks.new_empty((height, width), dtype=torch.int64)
    return labels, scores.new_empty((height, width) if want_score else (0,))
