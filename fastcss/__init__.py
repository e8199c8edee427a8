"""fastcss: kernels that run every task adapter of a continual-segmentation model in one pass."""

from . import nn, ops
from ._dispatch.info import info
from ._fuse.fusion import fuse
from ._one_pass.adapter_pool import AdapterPool
from ._one_pass.runner import one_pass
from ._tune_malloc import tune_malloc
from .ops import affinity_loss, class_affinity, cost_filter, merge_masks, multi_lora, select_tokens
from .packed_lora import PackedLora

__version__ = "0.1.0"
__all__ = [
    "AdapterPool",
    "PackedLora",
    "affinity_loss",
    "class_affinity",
    "cost_filter",
    "fuse",
    "info",
    "merge_masks",
    "multi_lora",
    "nn",
    "one_pass",
    "ops",
    "select_tokens",
    "tune_malloc",
]
