"""Runs the layers of SAM's image encoder on the fused op: queries, keys and values of the whole map, not of windows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import relative_attention
from .fused_module import Fused
from .mlp import norm_and_mlp

# Module → what the names of its classes begin with.
_COPIES = {
    "deepseek_ocr2": "DeepseekOcr2Sam",
    "got_ocr2": "GotOcr2",
    "pp_formulanet": "PPFormulaNet",
    "sam": "Sam",
    "sam_hq": "SamHQ",
    "slanext": "SLANeXt",
    "unlimited_ocr": "UnlimitedOcrSam",
}


def _classes(name: str) -> frozenset[str]:
    """Return the full name of each copy's class of that name."""
    return frozenset(f"transformers.models.{of}.modeling_{of}.{prefix}{name}" for of, prefix in _COPIES.items())


class _RelativeAttention(Fused):
    """Holds what the forms of this file share.

    Attributes:
        attention_name: of the module that attends; "" if that is the fused module itself.
        heads_name: of that module's number of heads.
        relative_name: of its flag that it has relative positions.
    """

    op = "relative_attention"
    attention_name = "attn"
    heads_name = "num_heads"
    relative_name = "use_rel_pos"

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        reason = super().why_not(module)
        if reason is None and not getattr(module.get_submodule(cls.attention_name), cls.relative_name):
            return "its attention has no relative positions"
        return reason

    def _can_run(self) -> bool:
        attention = self.get_submodule(self.attention_name)
        return (
            getattr(attention, self.relative_name)
            and not (attention.training and getattr(attention, "dropout", 0.0) > 0)
            and not torch.jit.is_tracing()
            and not self.is_watched()
        )

    def _attend(self, x: Tensor, window: int = 0) -> Tensor:
        """Run the attention with its projections: ``x`` [B, H, W, C] → [B, H, W, C]; 0 means no windows."""
        attention = self.get_submodule(self.attention_name)
        height, width = x.shape[1:3]
        heads = (3, getattr(attention, self.heads_name), -1)
        given = {
            "rel_h": _resize(attention.rel_pos_h, window or height),
            "rel_w": _resize(attention.rel_pos_w, window or width),
        }
        if window and (height % window or width % window):
            zeros = x.new_zeros(1, x.shape[-1])  # the model fills the map up with these
            _, given["pad_key"], given["pad_value"] = attention.qkv(zeros)[0].unflatten(-1, heads)
        q, k, v = attention.qkv(x).unflatten(-1, heads).unbind(3)
        del x  # large maps are given back as soon as they have been read
        x = relative_attention(q, k, v, **given, window=window or None, scale=attention.scale)
        del q, k, v
        return attention.proj(x)


class SamLayer(_RelativeAttention):
    """Runs a layer of transformers' SAM and of the models that took its encoder over."""

    classes = _classes("VisionLayer")
    mlps = _classes("MLPBlock")
    parts = (
        *("layer_norm1", "layer_norm2", "mlp", "window_size", "attn.dropout"),
        *(f"attn.{name}" for name in ("qkv", "proj", "scale", "num_attention_heads", "use_rel_pos")),
    )
    bypassed = ("attn",)
    heads_name = "num_attention_heads"

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not self._can_run():
            return super().forward(hidden_states)
        hidden_states = hidden_states + self._attend(self.layer_norm1(hidden_states), self.window_size)
        return norm_and_mlp(hidden_states, self.layer_norm2, self.mlp, self.mlps)


class SamBlock(_RelativeAttention):
    """Runs a block of the package segment_anything."""

    classes = frozenset(("segment_anything.modeling.image_encoder.Block",))
    mlps = frozenset(("segment_anything.modeling.common.MLPBlock",))
    parts = (
        *("norm1", "norm2", "mlp", "window_size"),
        *(f"attn.{name}" for name in ("qkv", "proj", "scale", "num_heads", "use_rel_pos")),
    )
    bypassed = ("attn",)

    def forward(self, x: Tensor) -> Tensor:
        if not self._can_run():
            return super().forward(x)
        x = x + self._attend(self.norm1(x), self.window_size)
        return norm_and_mlp(x, self.norm2, self.mlp, self.mlps)


class VitDetLayer(_RelativeAttention):
    """Runs a layer of ViTDet, whose maps have their channels first."""

    classes = frozenset(("transformers.models.vitdet.modeling_vitdet.VitDetLayer",))
    parts = (
        *("norm1", "norm2", "mlp", "drop_path", "window_size", "use_residual_block"),
        *(f"attention.{name}" for name in ("qkv", "proj", "scale", "num_heads", "use_relative_position_embeddings")),
    )
    bypassed = ("attention",)
    gives_weights = True
    attention_name = "attention"
    relative_name = "use_relative_position_embeddings"

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        if output_attentions or not self._can_run():
            return super().forward(hidden_states, output_attentions)
        hidden_states = hidden_states.permute(0, 2, 3, 1)
        hidden_states = hidden_states + self.drop_path(self._attend(self.norm1(hidden_states), self.window_size))
        hidden_states = hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))
        hidden_states = hidden_states.permute(0, 3, 1, 2)
        return (self.residual(hidden_states) if self.use_residual_block else hidden_states,)


class SegGptAttention(_RelativeAttention):
    """Runs the attention of SegGPT, which has no windows."""

    classes = frozenset(("transformers.models.seggpt.modeling_seggpt.SegGptAttention",))
    parts = ("qkv", "proj", "scale", "num_attention_heads", "use_relative_position_embeddings")
    gives_weights = True
    attention_name = ""
    heads_name = "num_attention_heads"
    relative_name = "use_relative_position_embeddings"

    def forward(self, hidden_states: Tensor, output_attentions: bool = False) -> tuple[Tensor, Tensor | None]:
        if output_attentions or not self._can_run():
            return super().forward(hidden_states, output_attentions)
        return self._attend(hidden_states), None


def _resize(table: Tensor, size: int) -> Tensor:
    """Bring the table [L, D] of a map of another size to [2 size − 1, D], as the models do."""
    if table.shape[0] == 2 * size - 1:
        return table
    return F.interpolate(table.T[None], size=2 * size - 1, mode="linear")[0].T
