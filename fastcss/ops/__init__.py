"""Every op of the package, one file each."""

from .. import _flops  # noqa: F401  so that torch.utils.flop_counter knows the ops
from .affinity_attention import affinity_attention
from .affinity_loss import affinity_loss
from .bi_attention import BiAttention, bi_attention
from .class_affinity import class_affinity
from .class_centers import class_centers
from .cost_filter import FilteredCost, PackedText, cost_filter, filtered_argmax, pack_text, scatter_cost, top_classes
from .deformable_attention import deformable_attention
from .merge_masks import merge_masks
from .multi_lora import multi_lora
from .phrase_pool import phrase_pool
from .prompt_mlp import prompt_mlp
from .select_tokens import SelectedTokens, select_tokens
from .top_margin import TopMargin, top_margin
from .topk_queries import TopQueries, topk_queries
from .window_attention import window_attention

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
    "scatter_cost",
    "select_tokens",
    "top_classes",
    "top_margin",
    "topk_queries",
    "window_attention",
]
