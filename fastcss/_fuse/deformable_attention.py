"""Runs the multi-scale deformable attention of Deformable DETR and its successors on the fused op."""

from __future__ import annotations

from torch import Tensor

from ..ops import deformable_attention
from .fused_module import Fused


class DeformableAttention(Fused):
    """Runs on ``fastcss.ops.deformable_attention``, and returns None for the attention weights."""

    op = "deformable_attention"
    classes = frozenset(
        f"transformers.models.{module}.modeling_{module}.{prefix}MultiscaleDeformableAttention"
        for module, prefix in {
            "deformable_detr": "DeformableDetr",
            "grounding_dino": "GroundingDino",
            "lw_detr": "LwDetr",
            "mm_grounding_dino": "MMGroundingDino",
            "omdet_turbo": "OmDetTurbo",
            "pp_doclayout_v2": "PPDocLayoutV2",
            "pp_doclayout_v3": "PPDocLayoutV3",
            "pp_doclayout_v4": "PPDocLayoutV4",
            "rf_detr": "RfDetr",
            "rt_detr": "RTDetr",
        }.items()
    )
    parts = (
        "value_proj",
        "sampling_offsets",
        "attention_weights",
        "output_proj",
        "n_heads",
        "n_levels",
        "n_points",
        "attn",
    )
    bypassed = ("attn",)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        reference_points: Tensor | None = None,
        *args,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        shapes = kwargs.get("spatial_shapes_list")
        if args or kwargs.get("output_attentions") or not _are_numbers(shapes) or self.is_watched():
            masks = (attention_mask, encoder_hidden_states, encoder_attention_mask)
            return super().forward(hidden_states, *masks, position_embeddings, reference_points, *args, **kwargs)
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = self.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            value = value.masked_fill(self._padding(attention_mask)[..., None], 0.0)
        points = (self.n_heads, self.n_levels, self.n_points)
        offsets = self.sampling_offsets(hidden_states).unflatten(-1, (*points, 2))
        logits = self.attention_weights(hidden_states).unflatten(-1, points)
        # Some models have one reference point for all levels.
        reference_points = reference_points.expand(*offsets.shape[:2], self.n_levels, -1)
        value = value.unflatten(-1, (self.n_heads, -1))
        return self.output_proj(deformable_attention(value, shapes, reference_points, offsets, logits)), None

    @staticmethod
    def _padding(attention_mask: Tensor) -> Tensor:
        """Return a mask that is True on the tokens that count as zeros."""
        return ~attention_mask


class PixelDecoderAttention(DeformableAttention):
    """Does the same for models whose mask is True on padding."""

    classes = frozenset(
        f"transformers.models.{name.lower()}.modeling_{name.lower()}."
        f"{name}PixelDecoderEncoderMultiscaleDeformableAttention"
        for name in ("Mask2Former", "OneFormer")
    )
    parts = DeformableAttention.parts[:-1]
    bypassed = ()

    @staticmethod
    def _padding(attention_mask: Tensor) -> Tensor:
        return attention_mask


def _are_numbers(shapes: object) -> bool:
    """Tell whether ``shapes`` lists the levels' sizes as Python numbers, so that no tensor has to be read."""
    return isinstance(shapes, (list, tuple)) and all(
        isinstance(shape, (list, tuple)) and all(isinstance(size, int) for size in shape) for shape in shapes
    )
