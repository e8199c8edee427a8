"""A model's own modules on the fused ops, where the arithmetic is the same."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .attention_weights import refuse_attention_weights
from .fused_module import Fused, fused_class
from .known_classes import fused_form, why_not_known


class Fusion:
    """What ``fuse`` did to a model.

    Attributes:
        replaced: name of each replaced module → name of the op that it runs on now.
        refused: name of each module that looks as if it could be replaced → why it was not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.replaced: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._name = type(model).__name__
        self._counts: Counter[tuple[str, str]] = Counter()  # of (op, class)
        self._refusals: Counter[tuple[str, str]] = Counter()  # of (reason, class)
        self._classes: list[tuple[nn.Module, type, type]] = []  # module, its class before and since
        self._guards: list = []

    def undo(self) -> None:
        """Give the modules that this fusion replaced their own classes back. A second time it does nothing.

        Raises:
            RuntimeError: a module's class was changed again since; nothing is undone then.
        """
        for name, (module, _, since) in zip(self.replaced, self._classes, strict=False):
            if type(module) is not since:
                raise RuntimeError(
                    f"fuse: {name!r} has become a {type(module).__name__} since; undo that before the fusion"
                )
        for module, before, _ in self._classes:
            module.__class__ = before
        for guard in self._guards:
            guard.remove()
        self._classes, self._guards = [], []

    def __repr__(self) -> str:
        lines = [f"Fusion of {self._name}: {len(self.replaced)} modules replaced, {len(self.refused)} refused"]
        lines += [f"  {count} × {cls} on {op}" for (op, cls), count in self._counts.items()]
        lines += [f"  {count} × {cls} not: {reason}" for (reason, cls), count in self._refusals.items()]
        return "\n".join(lines)

    def _replace(self, name: str, module: nn.Module, fused: type[Fused]) -> None:
        before = type(module)
        self.replaced[name] = fused.op
        self._counts[fused.op, before.__name__] += 1
        module.__class__ = fused_class(fused, before)
        self._classes.append((module, before, type(module)))

    def _refuse(self, name: str, module: nn.Module, reason: str) -> None:
        self.refused[name] = reason
        self._refusals[reason, type(module).__name__] += 1


def fuse(model: nn.Module) -> Fusion:
    """Replace, in place, the modules of ``model`` whose arithmetic the ops of this package have, and do faster.

    These are, of transformers: multi-scale deformable attention (Grounding DINO, Deformable DETR, RT-DETR, Mask2Former,
    OneFormer and others), Grounding DINO's fusion of image and text, the layers of Swin v1 (also in Donut, MaskFormer
    and CLAP); and ``torch.nn.Linear``, with another GEMM on AMD CPUs with AVX-512 only. A replaced module keeps its
    parameters, names, hooks and submodules, PEFT's layers among them: only its class changes, to a subclass of the one
    it had. Hooks on Swin's projections get the map in one piece, no longer cut into windows. Results are the same to
    the rounding of the dtype, and can be differentiated once.

    Who quantizes with ``torch.ao.quantization`` does it before: it would pass over fused linear layers, and is refused.

    Attention weights are never stored, so that no model can return them: asked for them it raises ValueError, but for
    Donut, MaskFormer's Swin and CLAP, which then run as before, and so does a module in training with dropout of
    attention weights.

    Args:
        model: any module; its transformers modules are found wherever they are in it. One that was fused before stays
            as it is: what is replaced already is listed as refused, and ``undo`` of the second fusion leaves it.

    Returns:
        A ``Fusion``, which lists what was ``replaced`` and what was ``refused``, and can ``undo()`` it. Nothing to
        replace is no error.

    Raises:
        TypeError: ``model`` is no module.

    Example:
        >>> fusion = fastcss.fuse(model)
        >>> print(fusion)
        >>> fusion.undo()
    """
    return fuse_modules(model, linears=True)


def fuse_modules(model: nn.Module, linears: bool) -> Fusion:
    """``fuse``; without ``linears`` for a caller that sees to linear layers itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    fusion = Fusion(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not linears:
            continue
        fused = fused_form(type(module))
        reason = fused.why_not(module) if fused else why_not_known(type(module))
        if reason:
            fusion._refuse(name, module, reason)
        elif fused:
            fusion._replace(name, module, fused)
    fusion._guards = refuse_attention_weights(model, [m for m, *_ in fusion._classes])
    return fusion
