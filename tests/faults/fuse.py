"""Faults in fused modules."""

from __future__ import annotations

from .fault import Fault

FUSE = [
    Fault(
        "fuse-padding-is-zeros-of-the-projection",
        "fastcss/_fuse/swin.py",
        'zip(("pad_key", "pad_value"), projections[1:], strict=True)',
        'zip(("pad_key", "pad_value"), projections[:2], strict=True)',
        "tests/fuse/test_fused_swin.py",
    ),
    Fault(
        "fuse-a-model-asked-for-weights-gives-none",
        "fastcss/_fuse/attention_weights.py",
        '        wanted = getattr(model.config, "output_attentions", False)',
        "        wanted = False",
        "tests/fuse",
    ),
    Fault(
        "fuse-the-mask-is-of-the-other-side",
        "fastcss/_fuse/bi_attention.py",
        "            text_attention_mask,\n            vision_attention_mask,\n            scale",
        "            text_attention_mask,\n            None,\n            scale",
        "tests/fuse/test_fused_bi_attention.py tests/fuse/test_fused_grounding_dino.py",
    ),
    Fault(
        "fuse-padding-only-where-both-sides-need-it",
        "fastcss/_fuse/sam.py",
        "if window and (height % window or width % window):",
        "if window and (height % window and width % window):",
        "tests/fuse/test_fused_sam.py",
    ),
    Fault(
        "fuse-a-hook-put-on-since-is-passed-over",
        "fastcss/_fuse/fused_module.py",
        "return any(_has_hooks(self.get_submodule(name)) for name in self.bypassed)",
        "return False",
        "tests/fuse/test_fused_sam.py tests/fuse/test_fuse_refusals.py",
    ),
    Fault(
        "fuse-an-adapter-in-the-mlp-is-left-out",
        "fastcss/_fuse/mlp.py",
        "all(isinstance(layer, Linear) and layer.made_of == (Linear, nn.Linear) for layer in layers)",
        "True",
        "tests/fuse/test_fused_mlp.py",
    ),
    Fault(
        "fuse-dropout-is-left-out-of-training",
        "fastcss/_fuse/swin.py",
        "            or (attention.training and attention.attention_dropout > 0)\n",
        "",
        "tests/fuse/test_fused_swin.py tests/fuse/test_fuse.py tests/fuse/test_fuse_refusals.py",
    ),
]
