"""Every op of the package, one file each."""

from .. import _flops  # noqa: F401  so that torch.utils.flop_counter knows the ops
from .multi_lora import multi_lora

__all__ = ["multi_lora"]
