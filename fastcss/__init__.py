"""fastcss: kernels that run every task adapter of a continual-segmentation model in one pass."""

from . import ops
from ._info import info
from ._malloc import tune_malloc
from .one_pass import one_pass
from .ops import multi_lora
from .packed_lora import PackedLora

__version__ = "0.1.0"
__all__ = ["PackedLora", "info", "multi_lora", "one_pass", "ops", "tune_malloc"]
