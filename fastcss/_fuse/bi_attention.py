"""Runs Grounding DINO's fusion of image and text on the fused op."""

from __future__ import annotations

from torch import Tensor

from ..ops import bi_attention
from .fused_module import Fused

Attended = tuple[Tensor, Tensor | None]


class BiMultiHeadAttention(Fused):
    """Runs on ``fastcss.ops.bi_attention``, and returns None for the attention weights."""

    op = "bi_attention"
    classes = frozenset(
        (
            "transformers.models.grounding_dino.modeling_grounding_dino.GroundingDinoBiMultiHeadAttention",
            "transformers.models.mm_grounding_dino.modeling_mm_grounding_dino.MMGroundingDinoBiMultiHeadAttention",
        )
    )
    parts = (
        "vision_proj",
        "text_proj",
        "values_vision_proj",
        "values_text_proj",
        "out_vision_proj",
        "out_text_proj",
        "num_heads",
        "scale",
        "dropout",
    )

    def forward(
        self,
        vision_features: Tensor,
        text_features: Tensor,
        vision_attention_mask: Tensor | None = None,
        text_attention_mask: Tensor | None = None,
    ) -> tuple[Attended, Attended]:
        if self.training and self.dropout > 0:
            return super().forward(vision_features, text_features, vision_attention_mask, text_attention_mask)
        heads = (self.num_heads, -1)
        attended = bi_attention(
            self.vision_proj(vision_features).unflatten(-1, heads),
            self.text_proj(text_features).unflatten(-1, heads),
            self.values_vision_proj(vision_features).unflatten(-1, heads),
            self.values_text_proj(text_features).unflatten(-1, heads),
            text_attention_mask,
            vision_attention_mask,
            scale=self.scale,
        )
        return (self.out_vision_proj(attended.image), None), (self.out_text_proj(attended.text), None)
