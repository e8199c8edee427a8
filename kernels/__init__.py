"""Triton kernels, one file an op. Imported only where Triton is there."""


def register() -> None:
    """Give the raw ops their Triton implementations. Called once, when the package finds a working Triton."""
    from . import (  # noqa: F401  each registers the raw ops of its name
        affinity_attention,
        affinity_attention_backward,
        affinity_loss,
        bi_attention,
        bi_attention_backward,
        class_affinity,
        class_affinity_backward,
        class_centers,
        class_centers_backward,
        cost_filter,
        cost_filter_backward,
        deformable_attention,
        deformable_attention_backward,
        merge_masks,
        multi_lora,
        multi_lora_backward,
        phrase_pool,
        phrase_pool_backward,
        prompt_mlp,
        prompt_mlp_backward,
        select_tokens,
        select_tokens_backward,
        top_classes,
        top_margin,
        topk_queries,
        window_attention,
        window_attention_backward,
    )
