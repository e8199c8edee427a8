"""Defines class-aware affinity (CAA): context from alike pixels, unlike pixels and class centres, for any backbone."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._dispatch.backends import IMPLEMENTATIONS
from .._dispatch.readable_values import readable
from .._ops._arguments import autocast, check_device, check_shapes
from ..ops import affinity_attention, affinity_loss, class_centers
from ._resize import resize
from .center_attention import CenterAttention, Norm, conv_norm_relu, to_map, to_pixels

#: A head draws its context from everything ("full"), or from what the ablations of tables 3.2 and 3.3 leave. "centers":
#: the features attend to the class centres, without an affinity map; "affinity": the map gathers from pixels alike and
#: unlike, without class centres; "intra", "inter": only the pixels alike, or only those unlike, attend to the centres.
CONTEXTS = ("full", "centers", "affinity", "intra", "inter")


class CAAOutput(NamedTuple):
    """Holds what ``ClassAwareAffinity`` returns; it is a tuple so that ``torch.compile`` and DDP see all its tensors.

    Attributes:
        logits: ``[B, C, h, w]``, the segmentation.
        coarse: ``[B, C, h, w]``, the coarse segmentation that the class centres are made with.
        q: ``[B, h·w, K]``, the queries of the affinity map ``sigmoid(Q Kᵀ)``.
        k: ``[B, h·w, K]``, its keys.

    Fields that the head's ``context`` does not use are None: ``coarse`` without class centres, ``q`` and ``k`` without
    the map.
    """

    logits: Tensor
    coarse: Tensor | None
    q: Tensor | None
    k: Tensor | None


class CAALosses(NamedTuple):
    """Holds scalars, at least float32: the weighted ``total`` to train with, and its three parts without weights."""

    total: Tensor
    seg: Tensor
    affinity: Tensor
    aux: Tensor


class ClassAwareAffinity(nn.Module):
    """Puts class-aware affinity between a backbone's features and their classification, as a segmentation head.

    Each pixel gathers features from the pixels alike (``M F``) and unlike (``(1 − M) F``). Both attend to the class
    centres of the coarse segmentation, and what they find is joined with the features. One segmentation layer, a 1×1
    convolution, makes the coarse segmentation from the features and the final one from the result. Without that layer,
    which the bare model has too, the module has 3,089,024 parameters at 512 channels. The N×N map is never made.

    The published count is 3,614,336. It includes a bottleneck convolution of OCRNet (525,312 parameters), which the
    author's code makes and never runs. With ``ocr_bottleneck=True`` the layer exists and runs, as in OCRNet. The
    published 13.05 GMAC of convolutions, at 64×64 pixels, 150 classes, have no room for it: the count is 13.03 without
    and 17.33 with it, including the second use of the segmentation layer (0.05 less here: the centres' keys are made
    once). Weights of a head with this layer do not load into one without: the error names them. If the layer was never
    run, as in the author's code, leave out the keys under ``center_attention.bottleneck``.

    Args:
        in_channels: D, channels of the features.
        num_classes: C, classes of the segmentation.
        key_channels: K, channels of the queries and keys of the affinity map.
        attention_channels: channels of the attention to the class centres.
        norm_layer: makes the normalisation of so many channels; ``nn.SyncBatchNorm.convert_sync_batchnorm`` works on
            the finished module.
        loss_weights: factors of the segmentation, affinity and auxiliary loss in ``loss``.
        ignore_index: pixels of this label are in no loss.
        context: "full", or one of the ablations of tables 3.2 and 3.3: "centers", "affinity", "intra", "inter"; see
            ``CONTEXTS``. The layers, map and losses of the parts left out do not exist.
        ocr_bottleneck: join the attended features with the attending ones by one more layer, as OCRNet does and eq.
            3.5, 3.7 do not.
        impl: implementation of the ops: "auto", or one of "reference", "composed", "cpu", "triton", "cuda".

    Raises:
        ValueError: a channel or class count is below 1, ``impl`` or ``context`` is unknown, there are not three loss
            weights, or ``ocr_bottleneck`` is set without class centres.

    Source: CAA (thesis chapter 3), table 3.5 for the size; details that the text leaves open follow the author's code.

    Example:
        >>> head = ClassAwareAffinity(512, num_classes=21)
        >>> output = head(torch.randn(2, 512, 32, 32))
        >>> head.loss(output, torch.randint(21, (2, 256, 256))).total.backward()
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        *,
        key_channels: int = 64,
        attention_channels: int = 256,
        norm_layer: Norm = nn.BatchNorm2d,
        loss_weights: tuple[float, float, float] = (1.0, 1.0, 0.4),
        ignore_index: int = 255,
        context: str = "full",
        ocr_bottleneck: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "num_classes": num_classes}
        sizes |= {"key_channels": key_channels, "attention_channels": attention_channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"ClassAwareAffinity: {name} must be at least 1, got {size}")
        if impl not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(
                f"ClassAwareAffinity: impl must be 'auto' or one of {', '.join(IMPLEMENTATIONS)}, got {impl!r}"
            )
        if len(loss_weights) != 3:
            raise ValueError(f"ClassAwareAffinity: loss_weights must be three numbers, got {loss_weights}")
        if context not in CONTEXTS:
            raise ValueError(f"ClassAwareAffinity: context must be one of {', '.join(CONTEXTS)}, got {context!r}")
        if ocr_bottleneck and context == "affinity":
            raise ValueError("ClassAwareAffinity: ocr_bottleneck must be False without class centres")
        self.in_channels, self.num_classes, self.impl = in_channels, num_classes, impl
        self.loss_weights, self.ignore_index, self.context = tuple(loss_weights), ignore_index, context
        both = {"full": ("intra", "inter"), "affinity": ("intra", "inter"), "centers": ()}
        self.gathered = both.get(context, (context,))

        self.segmentation = nn.Conv2d(in_channels, num_classes, 1)
        if self.gathered:
            self.query = nn.Conv2d(in_channels, key_channels, 1)
            self.key = nn.Conv2d(in_channels, key_channels, 1)
        for name in self.gathered:
            self.add_module(name, conv_norm_relu(in_channels, in_channels, norm_layer))
        for name in self.gathered:
            self.add_module(f"{name}_reduce", conv_norm_relu(2 * in_channels, in_channels, norm_layer))
        if context != "affinity":
            self.center_attention = CenterAttention(in_channels, attention_channels, norm_layer, ocr_bottleneck)
        self.fuse = conv_norm_relu((1 + max(1, len(self.gathered))) * in_channels, in_channels, norm_layer)

    def forward(self, features: Tensor) -> CAAOutput:
        """Segment the features.

        Args:
            features: ``[B, D, h, w]`` of the backbone; any strides, channels-last included; the module's dtype, or any
                floating-point dtype under autocast.

        Returns:
            ``(logits, coarse, q, k)``: see ``CAAOutput``.

        Raises:
            TypeError, ValueError: ``features`` is no floating-point tensor of that shape with at least one pixel.
            RuntimeError: the implementation asked for cannot run here; the message says why.
        """
        self._check_features(features)
        (features,) = autocast(features)  # casts once, not in each of the layers that read them
        coarse = q = k = None
        pixels, context = to_pixels(features), [features]  # [B, N, D], of [B, D, h, w] each
        if self.gathered:
            q, k = to_pixels(self.query(features)), to_pixels(self.key(features))  # [B, N, K]
            context = self._gather(features, affinity_attention(q, k, pixels, mean=True, impl=self.impl))
        if self.context != "affinity":
            coarse = self.segmentation(features)  # [B, C, h, w]
            centers = class_centers(coarse.flatten(2), pixels, over="pixels", impl=self.impl)  # [B, C, D]
            context = self.center_attention(*context, centers=centers)
        final = self.fuse(torch.cat([features, *context], dim=1))
        return CAAOutput(self.segmentation(final), coarse, q, k)

    def _gather(self, features: Tensor, intra_inter: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Join what the map gathered from the pixels alike and unlike, [B, N, D] each, with the features."""
        joined = []
        for name, x in zip(("intra", "inter"), intra_inter, strict=True):
            if name in self.gathered:
                x = self.get_submodule(name)(to_map(x, features.shape[2:]))
                joined.append(self.get_submodule(f"{name}_reduce")(torch.cat([features, x], dim=1)))
        return joined

    def loss(self, output: CAAOutput, labels: Tensor) -> CAALosses:
        """Compute an output's losses: segmentation and auxiliary cross-entropy at the labels' size, affinity at [h, w].

        Logits are upsampled to the labels (bilinear), labels down-sampled to the affinity map (nearest). The loss of a
        part that the head's ``context`` leaves out is 0. If no pixel counts, every loss is 0, with gradients 0. The
        method uses no parameters, so it may be called beside a DDP wrapper.

        Args:
            output: output of ``forward``.
            labels: integer ``[B, H, W]``, the class of each pixel or ``ignore_index``; H ≥ h and W ≥ w at one stride.

        Returns:
            ``(total, seg, affinity, aux)``; total is the sum weighted by ``loss_weights``.

        Raises:
            TypeError, ValueError: the labels have another kind, batch, size or device.
            IndexError: a label is neither a class nor ``ignore_index`` (on CPU; on CUDA reading them would stall).

        Source: eq. 3.9 to 3.12.
        """
        labels = self._check_labels(output.logits, labels)
        rows, columns = (
            torch.arange(small, device=labels.device) * large // small
            for small, large in zip(output.logits.shape[2:], labels.shape[1:], strict=True)
        )
        small = labels[:, rows[:, None], columns].flatten(1)  # [B, N]
        seg = self._cross_entropy(output.logits, labels)
        affinity = aux = torch.zeros_like(seg)
        if output.q is not None and output.k is not None:
            affinity = affinity_loss(output.q, output.k, small, ignore_index=self.ignore_index, impl=self.impl)
        if output.coarse is not None:
            aux = self._cross_entropy(output.coarse, labels)
        of_seg, of_affinity, of_aux = self.loss_weights
        total = of_seg * seg + of_affinity * affinity + of_aux * aux
        return CAALosses(total, seg, affinity, aux)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over the pixels that count; 0 if there are none, for which ``reduction="mean"`` gives NaN."""
        logits = resize(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[1:])
        total = F.cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
        return total / (labels != self.ignore_index).sum().clamp(min=1)

    def _check_features(self, features: Tensor) -> None:
        op = "ClassAwareAffinity"
        sizes = check_shapes(op, features=(features, "B D h w"))
        if not features.is_floating_point():
            raise TypeError(f"{op}: features must be a floating-point tensor, got {features.dtype}")
        if sizes["D"] != self.in_channels or sizes["h"] == 0 or sizes["w"] == 0:
            raise ValueError(
                f"{op}: features must be [B, {self.in_channels}, h, w] with at least one pixel, "
                f"got {list(features.shape)}"
            )

    def _check_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Check the labels, and return them as int64."""
        op = "ClassAwareAffinity.loss"
        sizes = check_shapes(op, logits=(logits, "B C h w"), labels=(labels, "B H W"))
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"{op}: labels must be a tensor of integers, got {labels.dtype}")
        check_device(op, "output", logits, "labels", labels)
        h, w, height, width = (sizes[letter] for letter in "hwHW")
        # One stride s gives both sizes, rounded down or up: H/(h + 1) < s < H/(h − 1), and the same for w.
        one_stride = height * (w - 1) < width * (h + 1) and width * (h - 1) < height * (w + 1)
        if height < h or width < w or not one_stride:
            raise ValueError(
                f"{op}: labels must be [B, H, W] of the picture whose features are {h}×{w}, at one stride in both "
                f"directions, got {height}×{width}"
            )
        if readable(labels):
            counted = labels[labels != self.ignore_index]
            low, high = (counted.min().item(), counted.max().item()) if counted.numel() else (0, 0)
            if low < 0 or high >= self.num_classes:
                raise IndexError(
                    f"{op}: labels must be from 0 to num_classes − 1 = {self.num_classes - 1}, or ignore_index = "
                    f"{self.ignore_index}; got values from {low} to {high}"
                )
        return labels.long()
