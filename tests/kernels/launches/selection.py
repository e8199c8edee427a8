"""The kernels of the selection ops compile for three GPU generations at the sizes they are for, without spilling."""

from __future__ import annotations

from typing import NamedTuple


class Selection(NamedTuple):
    """A call of one op, and of its backward where it has one."""

    op: str
    size: int  # pixels of the logits, rows and columns of the label map, tokens, or scalars of a prompt's input
    classes: int
    dtype: str = "bfloat16"
    labels: bool = True

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        size, classes = self.size, self.classes
        if self.op == "top_margin":
            logits = empty(1, classes, size)
            labels = empty(*((1, size) if self.labels else (0,)), dtype="int64")
            margin, rival, *floats, true, p_first = kernels.top_margin.top_margin(logits, labels, 255)
            kernels.top_margin.top_margin_backward(margin, *floats, logits, true, rival, p_first)
        elif self.op == "merge_masks":
            masks, scores, order = empty(classes, 256, 256), empty(classes), empty(classes, dtype="int64")
            kernels.merge_masks.merge_masks(masks, scores, order, size, size, 1024, 1024, 0.0, True)
        elif self.op == "select_tokens":
            tokens, texts = empty(1, size, 256), empty(1, classes, 256)
            for best_only in (False, True):
                selected, _, presence, *saved = kernels.select_tokens.select_tokens(tokens, texts, 0.3, 512, best_only)
                kernels.select_tokens_backward.select_tokens_backward(selected, presence, tokens, texts, *saved)
        else:
            z, index = empty(20, size), empty(20, dtype="int64")
            w1, b1 = empty(classes, size, 1024), empty(classes, 1024)
            w2, b2 = empty(classes, 1024, 1536), empty(classes, 1536)
            y, hidden = kernels.prompt_mlp.prompt_mlp(z, w1, b1, w2, b2, index)
            kernels.prompt_mlp_backward.prompt_mlp_backward(y, z, w1, w2, index, hidden, True, True)


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (
    Selection("top_margin", 512 * 512, 150),
    Selection("top_margin", 512 * 512, 150, dtype="float32", labels=False),
    Selection("merge_masks", 1024, 20),  # the second resizing is a copy
    Selection("merge_masks", 2048, 20, dtype="float32"),
    Selection("select_tokens", 17821, 20),
    Selection("select_tokens", 17821, 20, dtype="float32"),
    Selection("prompt_mlp", 512, 150),
    Selection("prompt_mlp", 1024, 150, dtype="float32"),
)
HOPPER = (
    Selection("top_margin", 97 * 97, 150),  # rows that begin anywhere
    Selection("top_margin", 512 * 512, 150, labels=False),
    Selection("top_margin", 512 * 512, 150, dtype="float32"),
    Selection("merge_masks", 400, 150),
    Selection("select_tokens", 17821, 100),
    Selection("select_tokens", 22223, 100, dtype="float32"),
    Selection("prompt_mlp", 1024, 150, dtype="float16"),
)
KERNELS = {
    "top_margin_kernel", "top_margin_gradient_kernel", "merge_masks_kernel",
    "best_class_kernel", "copy_selected_kernel",
    "token_places_kernel", "tokens_gradient_kernel", "class_sums_kernel", "classes_gradient_kernel",
    "layer_kernel", "weights_gradient_kernel",
}  # fmt: skip
