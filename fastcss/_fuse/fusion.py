"""Replaces a model's own modules by the fused ops that have the same arithmetic."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .attention_weights import refuse_attention_weights
from .fused_module import Fused, fused_class
from .known_classes import fused_form, why_not_known


class Fusion:
    """Lists what ``fuse`` did to a model, and can undo it.

    Attributes:
        replaced: name of each replaced module → name of the op that it runs on now.
        refused: name of each module that looks as if it could be replaced → why it was not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.replaced: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._name = type(model).__name__
        self._counts: Counter[tuple[str, str]] = Counter()  # the keys are (op, class)
        self._refusals: Counter[tuple[str, str]] = Counter()  # the keys are (reason, class)
        self._classes: list[tuple[nn.Module, type, type]] = []  # module, its class before and since
        self._guards: list = []

    def undo(self) -> None:
        """Give the modules that this fusion replaced their own classes back. A second call does nothing.

        Raises:
            RuntimeError: a module's class was changed again since the fusion; then nothing is undone.
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
        module.__class__ = fused_class(fused, before)  # type: ignore[arg-type]  # mypy looks at its instances' __hash__
        self._classes.append((module, before, type(module)))

    def _refuse(self, name: str, module: nn.Module, reason: str) -> None:
        self.refused[name] = reason
        self._refusals[reason, type(module).__name__] += 1


def fuse(model: nn.Module) -> Fusion:
    """Replace, in place, the modules of ``model`` that compute what an op of this package computes faster.

    From transformers these are multi-scale deformable attention (Grounding DINO, Deformable DETR, RT-DETR, Mask2Former,
    OneFormer and others), Grounding DINO's fusion of image and text, the layers of Swin v1 (also in Donut, MaskFormer
    and CLAP), and those of SAM's image encoder (SAM, SAM-HQ, GOT-OCR2, DeepSeek-VL hybrid and OCR2, Unlimited OCR,
    PP-FormulaNet, SLANeXt), of ViTDet and of SegGPT; from the package ``segment_anything`` the blocks of its image
    encoder. ``torch.nn.Linear`` gets another GEMM, on AMD CPUs with AVX-512 only, and so does SAM's MLP with its norm
    and GELU, in one kernel where no gradient is taken. A replaced module keeps its parameters, names, hooks and
    submodules, also PEFT's layers: only its class changes, to a subclass of the one it had. Hooks on the projections of
    Swin and SAM get the map in one piece, no longer cut into windows. Results are the same up to the rounding of the
    dtype, and can be differentiated once.

    Quantize with ``torch.ao.quantization`` before the fusion: afterwards it would pass over fused linear layers, so it
    is refused.

    Attention weights are never stored, so a fused model that is asked for them raises ValueError. Donut, MaskFormer's
    Swin, CLAP, ViTDet and SegGPT instead run as before when asked for them, and so does a module in training with
    dropout of attention weights, or with a hook on an inner module that it would pass over.

    Args:
        model: any module; what can be replaced is found wherever it is in it. A module that was fused before
            stays as it is: it is listed as refused, and ``undo`` of the second fusion leaves it alone.

    Returns:
        A ``Fusion``, which lists what was ``replaced`` and what was ``refused``, and can ``undo()`` it. A model with
        nothing to replace is no error.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> fusion = fastcss.fuse(model)
        >>> print(fusion)
        >>> fusion.undo()
    """
    return fuse_modules(model, linears=True)


def fuse_modules(model: nn.Module, linears: bool) -> Fusion:
    """Do what ``fuse`` does; without ``linears``, leave linear layers to a caller that handles them itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be a torch.nn.Module, got {type(model).__name__}")
    fusion = Fusion(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not linears:
            continue
        fused = fused_form(type(module))
        reason = fused.why_not(module) if fused else why_not_known(type(module))  # type: ignore[arg-type]
        if reason:
            fusion._refuse(name, module, reason)
        elif fused:
            fusion._replace(name, module, fused)
    fusion._guards = refuse_attention_weights(model, [m for m, *_ in fusion._classes])  # type: ignore[misc]
    return fusion
