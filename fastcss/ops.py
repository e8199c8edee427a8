"""Gathers every op of the package; each is defined in a file of its own."""

from ._ops.affinity_attention import affinity_attention
from ._ops.affinity_loss import affinity_loss
from ._ops.bi_attention import BiAttention, bi_attention
from ._ops.class_affinity import class_affinity
from ._ops.class_centers import class_centers
from ._ops.cost_filter import (
    FilteredCost,
    PackedText,
    cost_filter,
    filtered_argmax,
    pack_text,
    scatter_cost,
    top_classes,
)
from ._ops.deformable_attention import deformable_attention
from ._ops.merge_masks import merge_masks
from ._ops.multi_lora import multi_lora
from ._ops.phrase_pool import phrase_pool
from ._ops.prompt_mlp import prompt_mlp
from ._ops.relative_attention import relative_attention
from ._ops.select_tokens import SelectedTokens, select_tokens
from ._ops.top_margin import TopMargin, top_margin
from ._ops.topk_queries import TopQueries, topk_queries
from ._ops.window_attention import window_attention

__all__ = [
    "BiAttention",
    "FilteredCost",
    "PackedText",
    "SelectedTokens",
    "TopMargin",
    "TopQueries",
    "affinity_attention",
    "affinity_loss",
    "bi_attention",
    "class_affinity",
    "class_centers",
    "cost_filter",
    "deformable_attention",
    "filtered_argmax",
    "merge_masks",
    "multi_lora",
    "pack_text",
    "phrase_pool",
    "prompt_mlp",
    "relative_attention",
    "scatter_cost",
    "select_tokens",
    "top_classes",
    "top_margin",
    "topk_queries",
    "window_attention",
]
