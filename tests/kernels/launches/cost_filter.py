"""The kernels of cost_filter, topk_queries and phrase_pool compile for three GPU generations at the sizes they are for,
and without spilling."""

from __future__ import annotations

from typing import NamedTuple


def empty(*shape, dtype: str):
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


class CostFilter(NamedTuple):
    """cost_filter and its backward on five images of 24 × 24 pixels."""

    classes: int
    prompts: int
    kept: int
    depth: int = 512
    channels: str = "last"
    dtype: str = "bfloat16"

    def call(self) -> None:
        from fastcss import kernels

        kernels.register()
        if self.channels == "last":
            image = empty(5, 24, 24, self.depth, dtype=self.dtype)
        else:
            image = empty(5, self.depth, 24, 24, dtype=self.dtype).permute(0, 2, 3, 1)
        text = empty(1, self.classes, self.prompts, self.depth, dtype=self.dtype)
        nothing = empty(0, dtype="float32")
        cost, index, _ = kernels.cost_filter.cost_filter(image, text, nothing, nothing, self.kept)
        dcost = empty(*cost.shape, dtype=self.dtype)
        kernels.cost_filter_backward.cost_filter_backward(dcost, image, text, cost, index)


class TopkQueries(NamedTuple):
    """100 queries of one image of 800 × 1333 pixels."""

    classes: int = 150
    dtype: str = "bfloat16"

    def call(self) -> None:
        from fastcss import kernels

        kernels.register()
        features, prototypes = empty(1, 22223, 256, dtype=self.dtype), empty(self.classes, 256, dtype=self.dtype)
        kernels.topk_queries.topk_queries(features, prototypes, empty(self.classes, dtype=self.dtype), 100)


class PhrasePool(NamedTuple):
    """phrase_pool and its backward: 31 phrases of each class, and four images."""

    classes: int = 150
    depth: int = 512
    dtype: str = "bfloat16"

    def call(self) -> None:
        from fastcss import kernels

        kernels.register()
        cls, phrases = empty(4, self.depth, dtype=self.dtype), empty(self.classes, 31, self.depth, dtype=self.dtype)
        pooled = kernels.phrase_pool.phrase_pool(cls, phrases)
        kernels.phrase_pool_backward.phrase_pool_backward(empty(*pooled.shape, dtype=self.dtype), cls, phrases)


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (CostFilter(150, 80, 32), CostFilter(847, 1, 32), TopkQueries(), PhrasePool())
HOPPER = (
    CostFilter(847, 1, 256, depth=768, channels="first"),
    CostFilter(20000, 1, 512),
    CostFilter(847, 1, 32, dtype="float32"),
    TopkQueries(dtype="float32"),
    PhrasePool(dtype="float32"),
)
KERNELS = {
    "row_scale_kernel", "largest_cost_kernel", "class_score_kernel", "top_classes_kernel", "kept_cost_kernel",
    "unit_rows_kernel", "cosine_gradient_kernel", "text_gradient_kernel",
    "token_score_kernel", "gather_rows_kernel",
    "phrase_cosine_kernel", "pool_kernel", "phrases_gradient_kernel", "cls_gradient_kernel", "combine_kernel",
}  # fmt: skip
