"""The kernels of the affinity ops compile for three GPU generations at the sizes they are for, and without spilling."""

from __future__ import annotations

from typing import NamedTuple

DEPTH = 512


class Affinity(NamedTuple):
    """A call of one op on one image, and of its backward where it has one of its own."""

    op: str
    pixels: int
    width: int  # of values, or the number of classes
    key_width: int = 64
    dtype: str = "bfloat16"
    over: str = ""

    def call(self) -> None:
        import torch

        from fastcss import kernels

        def empty(*shape, dtype=self.dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        kernels.register()
        n, d = self.pixels, self.width
        q, k, v = empty(1, n, self.key_width), empty(1, n, self.key_width), empty(1, n, d)
        feats = empty(1, DEPTH, n).mT  # the view of an NCHW tensor
        if self.op == "affinity_attention":
            kernels.affinity_attention.affinity_attention(q, k, v, 1.0, True)
        elif self.op == "affinity_attention_backward":
            kernels.affinity_attention_backward.affinity_attention_backward(v, v, q, k, v, 1.0, True)
        elif self.op == "class_affinity":
            kernels.class_affinity.class_affinity(q, k, feats, empty(1, d, DEPTH), 1.0, True, True)
        elif self.op == "affinity_loss":
            labels, dloss = empty(1, n, dtype="int32"), empty(dtype="float32")
            kernels.affinity_loss.affinity_loss(q, k, labels, 1.0, 255)
            kernels.affinity_loss.affinity_loss_backward(dloss, q, k, labels, 1.0, 255)
        else:
            logits = empty(1, d, n)
            outputs = kernels.class_centers.class_centers(logits, feats, self.over == "classes")
            kernels.class_centers_backward.class_centers_backward(outputs[0], logits, feats, *outputs)


# Each case compiles the kernels that it launches; one that an earlier case launched in the same way is not listed
# again.
CASES = (
    Affinity("class_affinity", 16384, 150),
    Affinity("affinity_attention", 4096, 512),
    Affinity("affinity_attention_backward", 4096, 150),
    Affinity("affinity_loss", 4096, 0),
    Affinity("class_centers", 4096, 150, over="classes"),
)
HOPPER = (
    Affinity("class_affinity", 4096, 21),
    Affinity("affinity_attention", 4096, 150, key_width=256),
    Affinity("affinity_attention", 4096, 150, dtype="float32"),
    Affinity("affinity_attention_backward", 4096, 512),
    Affinity("affinity_attention_backward", 4096, 150, key_width=256),
    Affinity("affinity_loss", 4096, 0, dtype="float32"),
    Affinity("class_centers", 4096, 21, over="pixels"),
    Affinity("class_centers", 9409, 171, over="pixels"),  # 97², whose rows begin anywhere
)
KERNELS = {
    "column_sums_kernel", "combine_kernel", "affinity_kernel", "affinity_gradient_kernel", "attend_classes_kernel",
    "affinity_loss_kernel", "affinity_loss_gradient_kernel", "mean_over_pairs_kernel",
    "pixel_lse_kernel", "class_centers_kernel", "combine_centers_kernel",
    "center_gradient_dots_kernel", "feats_gradient_kernel", "logits_gradient_kernel",
}  # fmt: skip
