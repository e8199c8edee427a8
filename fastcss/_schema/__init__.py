"""Every raw op's schema and fake kernel, one file an op. Imports torch only, so the package works where nothing is
compiled."""

from . import (  # noqa: F401  each defines the raw ops of its name
    affinity_attention,
    affinity_loss,
    bi_attention,
    class_affinity,
    class_centers,
    cost_filter,
    deformable_attention,
    fingerprint,
    merge_masks,
    multi_lora,
    phrase_pool,
    prompt_mlp,
    select_tokens,
    top_margin,
    topk_queries,
    window_attention,
)
from ._library import COMPILED, LIBRARY

__all__ = ["COMPILED", "LIBRARY"]
