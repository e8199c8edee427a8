"""Lets pixels attend to class centres, as in OCRNet, and has the 1×1 layers that this and the CAA head consist of."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Norm = Callable[[int], nn.Module]


class CenterAttention(nn.Module):
    """Lets pixels attend to class centres, like OCRNet's object attention; all maps share one set of weights.

    Args:
        channels: D, channels of the maps, of the centres and of the results.
        attention_channels: channels of queries, keys and values; the products are scaled by its −½th power.
        norm_layer: makes the normalisation of so many channels.
        bottleneck: join the attended features with the map by one more layer, as OCRNet does.
    """

    def __init__(self, channels: int, attention_channels: int, norm_layer: Norm, bottleneck: bool) -> None:
        super().__init__()

        def two_layers() -> nn.Sequential:
            first = conv_norm_relu(channels, attention_channels, norm_layer)
            return nn.Sequential(first, conv_norm_relu(attention_channels, attention_channels, norm_layer))

        self.scale = attention_channels**-0.5
        self.query, self.key = two_layers(), two_layers()
        self.value = conv_norm_relu(channels, attention_channels, norm_layer)
        self.out = conv_norm_relu(attention_channels, channels, norm_layer)
        self.bottleneck = conv_norm_relu(2 * channels, channels, norm_layer) if bottleneck else None

    def forward(self, *maps: Tensor, centers: Tensor) -> list[Tensor]:
        """Attend: ``maps`` [B, D, h, w] each, ``centers`` [B, C, D] → a [B, D, h, w] for each map."""
        columns = centers.mT.unsqueeze(3)  # [B, D, C, 1]
        key, value = (to_pixels(layer(columns)).unsqueeze(1) for layer in (self.key, self.value))  # [B, 1, C, A]
        attended = []
        for x in maps:
            query = to_pixels(self.query(x)).unsqueeze(1)  # [B, 1, N, A]
            context = F.scaled_dot_product_attention(query, key, value, scale=self.scale).squeeze(1)
            context = self.out(to_map(context, x.shape[2:]))
            attended.append(context if self.bottleneck is None else self.bottleneck(torch.cat([context, x], dim=1)))
        return attended

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others: Any) -> None:
        """Explain keys that torch would only call unexpected, or would drop without ``strict``."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        given = [key for key in state_dict if key.startswith(f"{prefix}bottleneck.")]
        if given and self.bottleneck is None:
            warnings.warn(
                f"{', '.join(given)}: of a layer that ClassAwareAffinity has with ocr_bottleneck=True alone. Weights "
                "trained with it need that; if it was never run, as by the author's code, leave out its keys",
                stacklevel=2,
            )


def conv_norm_relu(in_channels: int, out_channels: int, norm_layer: Norm) -> nn.Sequential:
    """Make a 1×1 convolution without bias, its normalisation and a ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), norm_layer(out_channels), nn.ReLU(inplace=True)
    )


def to_pixels(x: Tensor) -> Tensor:
    """View a map as pixels: [B, D, h, w] → [B, N, D]."""
    return x.flatten(2).mT


def to_map(x: Tensor, size: torch.Size) -> Tensor:
    """View pixels as a map: [B, N, D] → [B, D, h, w]."""
    return x.mT.unflatten(2, size)
