"""Every op of the package, one file each."""

from .. import _flops  # noqa: F401  so that torch.utils.flop_counter knows the ops
from .affinity_attention import affinity_attention
from .affinity_loss import affinity_loss
from .class_affinity import class_affinity
from .class_centers import class_centers
from .multi_lora import multi_lora

__all__ = ["affinity_attention", "affinity_loss", "class_affinity", "class_centers", "multi_lora"]
