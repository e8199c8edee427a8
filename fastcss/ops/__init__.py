"""Every op of the package, one file each."""

from .multi_lora import multi_lora

__all__ = ["multi_lora"]
