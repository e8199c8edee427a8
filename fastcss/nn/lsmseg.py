"""Defines LSMSeg's head, which segments open vocabularies by cost maps of only the classes likely in the image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._dispatch.readable_values import readable
from .._ops._arguments import check_alike, check_device, check_shapes
from ..ops import FilteredCost, PackedText, filtered_argmax, scatter_cost
from ._resize import resize
from .cost_filter import CategoryFilter
from .cost_refinement import ClassRefinement, GuidedUpsampling, SpatialRefinement, conv_relu


class LSMSegHead(nn.Module):
    """Computes logits of any T classes, given by text, from CLIP's image features, optionally joined with SAM's.

    The features are fused, and the cosine maps of the k best classes are embedded, refined over space and over classes,
    and upsampled with guidance. Every step treats the classes alike. So T and the classes may change between calls, and
    ``k ≥ T`` gives the same as no filter.

    Args:
        channels: D, channels of CLIP's image features and of the text.
        sam_channels: S, channels of SAM's features; None without them. The thesis takes three of SAM's layers and does
            not say how they are combined: here they come as one map.
        guidance_channels: G, channels of each intermediate feature map that guides an upsampling stage, one for each of
            ``upsample_channels``; empty for upsampling without guidance.
        prompts: P, prompts of each class.
        k: how many classes to keep of an image; None keeps all.
        hidden: C, channels of the embedded cost, and of the projected visual and text guidance.
        layers: number of layers; each is a spatial and then a class refinement.
        heads: heads of the attention in both; a divisor of ``hidden``.
        window: pixels on a side of the spatial attention's windows.
        upsample_channels: channels of the maps after each upsampling stage; each stage doubles their size.
        impl: implementation of the cost filter: "auto", or one of "reference", "composed", "cpu", "triton", "cuda".

    Raises:
        TypeError, ValueError: a size is too small or does not fit; the message names it.

    Source: LSMSeg (thesis chapter 5) eq. 5.1–5.9. It leaves open the sizes, and the layers within the refinement and
    the upsampling: they are those of CAT-Seg for CLIP ViT-B/16 (two layers, 24×24 maps in 12×12 windows). It differs
    from CAT-Seg as the thesis does: the class refinement has no pooling and no padding tokens, and the filter also runs
    in training.

    Example:
        >>> head = LSMSegHead(512, sam_channels=256)
        >>> image, sam, text = torch.randn(1, 512, 12, 12), torch.randn(1, 256, 32, 32), torch.randn(150, 1, 512)
        >>> head(image, text, sam).shape
        torch.Size([1, 150, 48, 48])
    """

    def __init__(
        self,
        channels: int,
        *,
        sam_channels: int | None = None,
        guidance_channels: Sequence[int] = (),
        prompts: int = 1,
        k: int | None = 32,
        hidden: int = 128,
        layers: int = 2,
        heads: int = 4,
        window: int = 12,
        upsample_channels: Sequence[int] = (64, 32),
        impl: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"channels": channels, "prompts": prompts, "layers": layers, "heads": heads, "window": window}
        sizes |= {} if sam_channels is None else {"sam_channels": sam_channels}
        sizes |= {f"guidance_channels[{i}]": size for i, size in enumerate(guidance_channels)}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"LSMSegHead: {name} must be at least 1, got {size}")
        if hidden < 4 or hidden % heads:
            raise ValueError(f"LSMSegHead: hidden must be a multiple of heads = {heads} and at least 4, got {hidden}")
        if any(size < 4 for size in upsample_channels):
            raise ValueError(f"LSMSegHead: upsample_channels must each be at least 4, got {tuple(upsample_channels)}")
        if len(guidance_channels) not in (0, len(upsample_channels)):
            raise ValueError(
                f"LSMSegHead: guidance_channels must be {len(upsample_channels)}, one for each upsampling stage, or "
                f"none, got {tuple(guidance_channels)}"
            )
        self.channels, self.sam_channels, self.prompts = channels, sam_channels, prompts
        self.guidance_channels = tuple(guidance_channels)

        if sam_channels is not None:
            self.fusion_weight = nn.Parameter(torch.tensor(0.5))
            self.sam_projection = nn.Conv2d(sam_channels, channels, 1)
        self.category_filter = CategoryFilter(k, impl=impl)
        self.cost_embedding = nn.Conv2d(prompts, hidden, 7, padding=3)
        self.visual_projection = conv_relu(channels, hidden)
        self.text_projection = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(inplace=True))
        self.spatial = nn.ModuleList([SpatialRefinement(hidden, heads, window) for _ in range(layers)])
        self.classes = nn.ModuleList([ClassRefinement(hidden, heads) for _ in range(layers)])
        widths = (hidden, *upsample_channels)
        guides = self.guidance_channels or (0,) * len(upsample_channels)
        stages = zip(widths, widths[1:], guides, strict=False)
        self.upsampling = nn.ModuleList([GuidedUpsampling(*stage) for stage in stages])
        self.segmentation = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(
        self, image: Tensor, text: Tensor | PackedText, sam: Tensor | None = None, guidance: Sequence[Tensor] = ()
    ) -> Tensor:
        """Compute the logits of all classes; ``filtered`` and ``predict`` need k/T of the memory if not all are wanted.

        Args:
            image: ``[B, D, H, W]``, CLIP's features; the module's dtype, or any floating-point dtype under autocast.
            text: ``[T, P, D]`` for the whole batch, or ``[B, T, P, D]``; or either from ``ops.pack_text``, which
                carries no gradient.
            sam: ``[B, S, h, w]``, SAM's features of the same image, if the head was made for them; they are resized to
                [H, W].
            guidance: the intermediate features ``[B, G, h, w]`` of each upsampling stage, if the head was made for
                them; they are projected, then resized to the stage's maps, whose side is 2, 4, … times that of
                ``image``.

        Returns:
            Logits ``[B, T, H′, W′]``, with H′ = 4 H after two stages; −100 for the classes that were not kept, which
            carry no gradient.

        Raises:
            TypeError, ValueError: an argument of the wrong kind, dtype, device or shape, named in the message.
            RuntimeError: the implementation asked for cannot run here; the message says why.
        """
        classes = self._check(image, text, sam, guidance)
        return scatter_cost(self._refine(image, text, sam, guidance), classes)

    def filtered(
        self, image: Tensor, text: Tensor | PackedText, sam: Tensor | None = None, guidance: Sequence[Tensor] = ()
    ) -> FilteredCost:
        """Compute logits of the kept classes only: ``FilteredCost(logits [B, k, H′, W′], index [B, k], score [B, k])``.

        The arguments are those of ``forward``. ``ops.scatter_cost`` and ``ops.filtered_argmax`` process the result
        further, also after its logits were resized: ``filtered._replace(cost=…)``.
        """
        self._check(image, text, sam, guidance)
        return self._refine(image, text, sam, guidance)

    @torch.no_grad()
    def predict(
        self, image: Tensor, text: Tensor | PackedText, sam: Tensor | None = None, guidance: Sequence[Tensor] = ()
    ) -> Tensor:
        """Return each pixel's best class, int64 ``[B, H′, W′]``: ``forward(…).argmax(1)`` without [B, T, H′, W′]."""
        return filtered_argmax(self.filtered(image, text, sam, guidance))

    def loss(self, filtered: FilteredCost, labels: Tensor, *, ignore_index: int = 255) -> Tensor:
        """Compute the binary cross-entropy of the kept classes' logits, upsampled to the labels, as CAT-Seg trains.

        Each class is a separate question. So a pixel whose class was not kept is a "no" to the classes that were, and
        the −100 of its own class has no effect. With a cross-entropy over the T classes such a pixel would have a loss
        of about 100, which a step can lower only by driving the logits of all kept classes down for ever.

        Args:
            filtered: output of ``filtered``.
            labels: integer ``[B, H, W]``, the class of each pixel among all T, or ``ignore_index``.
            ignore_index: pixels of this label are not in the loss.

        Returns:
            A scalar, at least float32: the mean over the pixels that count and the kept classes; 0 without such pixels.

        Raises:
            TypeError, ValueError: the labels have another kind, batch, shape or device.
            IndexError: a negative label is not ``ignore_index`` (on CPU; on CUDA reading them would stall).
        """
        op = "LSMSegHead.loss"
        logits, index, _ = filtered
        check_shapes(op, **{"filtered.cost": (logits, "B k h w"), "labels": (labels, "B H W")})
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{op}: labels must be a tensor of integers, got {labels.dtype}")
        check_device(op, "filtered.cost", logits, "labels", labels)
        counted = labels != ignore_index
        if readable(labels) and (low := int(labels.masked_fill(~counted, 0).min())) < 0:
            raise IndexError(f"{op}: labels must be at least 0, or ignore_index = {ignore_index}, got {low}")
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[1:])
        target = (labels.unsqueeze(1) == index[:, :, None, None]).to(logits.dtype)
        weight = counted.unsqueeze(1).to(logits.dtype)
        losses = F.binary_cross_entropy_with_logits(logits, target, weight, reduction="sum")
        return losses / (counted.sum() * logits.shape[1]).clamp(min=1)

    def _refine(
        self, image: Tensor, text: Tensor | PackedText, sam: Tensor | None, guidance: Sequence[Tensor]
    ) -> FilteredCost:
        fused = image if sam is None else self._fuse(image, sam)
        kept = self.category_filter(fused, text)  # (5.2) to (5.6)
        x = self.cost_embedding(kept.cost.flatten(0, 1)).unflatten(0, kept.index.shape)
        x = x.permute(0, 1, 3, 4, 2).contiguous()  # [B, k, H, W, C]
        visual = self.visual_projection(fused).permute(0, 2, 3, 1)  # [B, H, W, C]
        words = self.text_projection(_kept_text(_embeddings(text), kept.index))  # [B, k, C]
        for spatial, classes in zip(self.spatial, self.classes, strict=True):
            x = spatial(x, visual)  # (5.7)
            x = classes(x, words)  # (5.8)
        x = x.permute(0, 1, 4, 2, 3)
        for stage, features in zip(self.upsampling, guidance or (None,) * len(self.upsampling), strict=True):
            x = stage(x, features)  # (5.9)
        logits = self.segmentation(x.flatten(0, 1)).view(*kept.index.shape, *x.shape[3:])
        return kept._replace(cost=logits)

    def _fuse(self, image: Tensor, sam: Tensor) -> Tensor:
        """Fuse the features, (5.1).

        Resizing commutes with the linear layer. Done before it, it needs no gradient if the encoder is frozen.
        """
        sam = self.sam_projection(resize(sam, image.shape[2:]))
        return self.fusion_weight * image + (1 - self.fusion_weight) * sam

    def _check(self, image: Tensor, text: Tensor | PackedText, sam: Tensor | None, guidance: Sequence[Tensor]) -> int:
        """Check all arguments before anything is computed; return T."""
        op = "LSMSegHead"
        sizes = check_shapes(op, image=(image, "B D H W"))
        if sizes["D"] != self.channels or 0 in image.shape[2:]:
            raise ValueError(
                f"{op}: image must be [B, {self.channels}, H, W] with at least one pixel, got {list(image.shape)}"
            )
        for name, given, wanted in (
            ("sam", sam is not None, self.sam_channels is not None),
            ("guidance", len(guidance) > 0, len(self.guidance_channels) > 0),
        ):
            if given != wanted:
                raise ValueError(f"{op}: {name} must {'' if wanted else 'not '}be given: {name}_channels says so")
        if len(guidance) != len(self.guidance_channels):
            raise ValueError(f"{op}: guidance must be {len(self.guidance_channels)} tensors, got {len(guidance)}")
        maps = {} if sam is None else {"sam": (sam, self.sam_channels)}
        maps |= {f"guidance[{i}]": pair for i, pair in enumerate(zip(guidance, self.guidance_channels, strict=True))}
        for name, (tensor, channels) in maps.items():
            check_shapes(op, image=(image, "B D H W"), **{name: (tensor, "B C h w")})
            if tensor.shape[1] != channels or 0 in tensor.shape[2:]:
                raise ValueError(
                    f"{op}: {name} must be [B, {channels}, h, w] with at least one pixel, got {list(tensor.shape)}"
                )
        if not isinstance(text, Tensor | PackedText):
            raise TypeError(f"{op}: text must be a tensor or from pack_text, got {type(text).__name__}")
        embeddings = _embeddings(text)
        batch, classes, prompts, channels = embeddings.shape if embeddings.dim() == 4 else (0,) * 4
        if (prompts, channels) != (self.prompts, self.channels) or classes == 0 or batch not in (1, sizes["B"]):
            raise ValueError(
                f"{op}: text must be [T, {self.prompts}, {self.channels}] or [{sizes['B']}, T, {self.prompts}, "
                f"{self.channels}] with at least one class, got "
                f"{list((text.text if isinstance(text, PackedText) else text).shape)}"
            )
        check_alike(op, image=image, text=embeddings, **{name: tensor for name, (tensor, _) in maps.items()})
        return classes


def _embeddings(text: Tensor | PackedText) -> Tensor:
    """Return the text as [1 or B, T, P, D]."""
    text = text.text if isinstance(text, PackedText) else text
    return text.unsqueeze(0) if text.dim() == 3 else text


def _kept_text(text: Tensor, index: Tensor) -> Tensor:
    """Return T′ of (5.5), averaged over prompts to length one.

    ``text`` [1 or B, T, P, D], ``index`` [B, k] → [B, k, D].
    """
    text = text.expand(index.shape[0], -1, -1, -1)
    text = text.gather(1, index[:, :, None, None].expand(-1, -1, *text.shape[2:]))
    return F.normalize(F.normalize(text, dim=-1).mean(dim=2), dim=-1)
