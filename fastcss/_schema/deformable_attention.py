import math

from torch import Tensor

from ._library import raw_op


# value [B, S, heads, D]; shapes: h and w of each level in turn, Σ h w = S; reference_points [B, Q, levels, 2 or 4];
# offsets [B, Q, heads, levels, points, 2], logits [B, Q, heads, levels, points]. → [B, Q, heads · D].
@raw_op(
    "(Tensor value, SymInt[] shapes, Tensor reference_points, Tensor offsets, Tensor logits) -> Tensor",
    flops=lambda value, shapes, points, offsets, logits: 8 * math.prod(logits) * value[3],  # four corners of each
)
def deformable_attention(value, shapes, reference_points, offsets, logits) -> Tensor:
    return value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])


# dreference is empty unless need_reference.
@raw_op(
    "(Tensor dout, Tensor value, SymInt[] shapes, Tensor reference_points, Tensor offsets, Tensor logits, "
    "bool need_reference) -> (Tensor dvalue, Tensor dreference, Tensor doffsets, Tensor dlogits)",
    flops=lambda dout, value, shapes, points, offsets, logits, *_: 16 * math.prod(logits) * value[3],
)
def deformable_attention_backward(
    dout, value, shapes, reference_points, offsets, logits, need_reference
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dreference = reference_points.new_empty(reference_points.shape if need_reference else (0,))
    return value.new_empty(value.shape), dreference, offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)
