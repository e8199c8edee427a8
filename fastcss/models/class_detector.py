"""Detects classes, language-driven and task-aware: Grounding DINO's encoder reads an image and a task's classes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import phrase_pool
from .grounding_dino import GroundingDinoEncoder, TextFeatures


class DetectedClasses(NamedTuple):
    """Holds the image's tokens and the classes after they have read each other.

    Attributes:
        tokens: V', ``[B, N, D]``, the tokens of one level after the other.
        classes: E', ``[B, c, D]``, zeros for classes that are masked.
        shapes: int64 ``[levels, 2]`` on the CPU, the (height, width) of each level.
    """

    tokens: Tensor
    classes: Tensor
    shapes: Tensor


class ClassDetector(GroundingDinoEncoder):
    """Runs the encoder with one token per class in place of words: its phrases, weighted by the image itself.

    The paper leaves open what a class token is to the feature enhancer. Here it is a phrase of one word: it reads
    only itself, at position 0.

    Source: DecoupleCSS sections 3.2.1 and 3.2.2.
    """

    def forward(
        self,
        pixel_values: Tensor,
        phrases: Tensor,
        class_mask: Tensor | None = None,
        pixel_mask: Tensor | None = None,
    ) -> DetectedClasses:
        """Detect the classes in the images.

        Args:
            pixel_values: ``[B, 3, H, W]``.
            phrases: ``[c, M, D]``, M phrases per class, from ``embed_phrases``.
            class_mask: bool ``[c]``, True for rows that are no class (padding).
            pixel_mask: ``[B, H, W]``, 0 on padding.
        """
        image = self.embed_image(pixel_values, pixel_mask)
        dtype = image.features.dtype
        wide = torch.promote_types(dtype, torch.float32)  # float16 ends at 65,504, and a picture has 22,223 tokens
        seen = (~image.mask).to(dtype)[..., None]
        # [B, D]; the mean serves, as Swin has no class token
        cls = ((image.features * seen).sum(1, dtype=wide) / seen.sum(1, dtype=wide)).to(dtype)
        pooled = phrase_pool(cls, phrases.to(dtype))  # [B, c, D]
        batch, count, _ = pooled.shape
        if class_mask is None:
            class_mask = torch.zeros(count, dtype=torch.bool, device=pooled.device)
        text = TextFeatures(
            features=pooled,
            mask=class_mask.expand(batch, -1),
            self_mask=~torch.eye(count, dtype=torch.bool, device=pooled.device).expand(batch, -1, -1),
            position_ids=torch.zeros(batch, count, dtype=torch.long, device=pooled.device),
        )
        enhanced = self.enhance(image, text)
        classes = enhanced.last_hidden_state_text.masked_fill(class_mask[:, None], 0)
        return DetectedClasses(enhanced.last_hidden_state_vision, classes, torch.tensor(image.shapes, device="cpu"))

    def embed_phrases(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed word ids ``[c, M, L]`` of M phrases per class → ``[c, M, D]``, the mean over a phrase's words.

        The [CLS] and [SEP] at both ends do not count as words of the phrase.
        """
        ids, mask = input_ids.flatten(0, 1), attention_mask.flatten(0, 1)
        hidden = self.text_projection(self.text_backbone(ids, attention_mask=mask).last_hidden_state)
        words = (mask.bool() & ~torch.isin(ids, self.special_tokens)).to(hidden.dtype)[..., None]
        return ((hidden * words).sum(1) / words.sum(1).clamp(min=1)).unflatten(0, input_ids.shape[:2])
