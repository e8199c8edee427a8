from torch import Tensor

from ._library import define

# value [B, S, heads, D]; shapes: h and w of each level in turn, Σ h w = S; reference_points [B, Q, levels, 2 or 4];
# offsets [B, Q, heads, levels, points, 2], logits [B, Q, heads, levels, points]. → [B, Q, heads · D].
_DEFORMABLE_ATTENTION = (
    "(Tensor value, SymInt[] shapes, Tensor reference_points, Tensor offsets, Tensor logits) -> Tensor"
)


def _deformable_attention_fake(value, shapes, reference_points, offsets, logits) -> Tensor:
    return value.new_empty(*offsets.shape[:2], value.shape[2] * value.shape[3])


define("deformable_attention", _DEFORMABLE_ATTENTION, _deformable_attention_fake)

# dreference is empty unless need_reference.
_DEFORMABLE_ATTENTION_BACKWARD = (
    "(Tensor dout, Tensor value, SymInt[] shapes, Tensor reference_points, Tensor offsets, Tensor logits, "
    "bool need_reference) -> (Tensor dvalue, Tensor dreference, Tensor doffsets, Tensor dlogits)"
)


def _deformable_attention_backward_fake(
    dout, value, shapes, reference_points, offsets, logits, need_reference
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dreference = reference_points.new_empty(reference_points.shape if need_reference else (0,))
    return value.new_empty(value.shape), dreference, offsets.new_empty(offsets.shape), logits.new_empty(logits.shape)


define("deformable_attention_backward", _DEFORMABLE_ATTENTION_BACKWARD, _deformable_attention_backward_fake)
