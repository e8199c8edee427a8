"""Runs Swin's layers on the fused op: attention within windows, on queries, keys and values of the whole map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import window_attention
from .fused_module import Fused

_NORMS = ("layernorm_before", "layernorm_after", "drop_path", "window_size", "shift_size")


class SwinLayer(Fused):
    """Runs a layer of Swin v1, and returns None for the attention weights."""

    op = "window_attention"
    classes = frozenset(("transformers.models.swin.modeling_swin.SwinLayer",))
    parts = (
        *_NORMS,
        "mlp",
        "dropout",
        "set_shift_and_window_size",
        *(f"attention.{name}_proj" for name in "qkvo"),
        "attention.relative_position_bias.window_size",
        "attention.head_dim",
        "attention.scaling",
        "attention.attention_dropout",
        "attention.config",
    )
    bypassed = ("attention",)

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs
    ) -> tuple[Tensor, Tensor | None]:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attention = self.attention
        if (
            kwargs.get("output_attentions")
            or not _fits(self, attention.relative_position_bias.window_size)
            or (attention.training and attention.attention_dropout > 0)
            or attention.config._attn_implementation not in ("eager", "sdpa")
        ):
            return super().forward(hidden_states, input_dimensions, always_partition=always_partition, **kwargs)
        attended = _attend(
            self,
            self.layernorm_before(hidden_states),
            input_dimensions,
            (attention.q_proj, attention.k_proj, attention.v_proj),
            attention.relative_position_bias()[0],
            attention.head_dim,
            attention.scaling,
        )
        hidden_states = hidden_states + self.drop_path(self.dropout(attention.o_proj(attended)))
        return self.dropout(self.mlp(self.layernorm_after(hidden_states))) + hidden_states, None


class _SwinCopy(Fused):
    """Holds what the copies of Swin's first layout share: ``query``, ``key`` and ``value`` in ``attention.self``."""

    op = "window_attention"
    parts = (
        *_NORMS,
        "intermediate",
        "output",
        "attention.output",
        *(f"attention.self.{name}" for name in ("query", "key", "value", "window_size", "attention_head_size")),
        *(f"attention.self.relative_position_{name}" for name in ("bias_table", "index")),
        "attention.self.dropout.p",
    )
    bypassed = ("attention", "attention.self")
    gives_weights = True

    def _can_run(self) -> bool:
        attention = self.attention.self
        return _fits(self, attention.window_size) and not (attention.dropout.training and attention.dropout.p > 0)

    def _run(self, hidden_states: Tensor, size: tuple[int, int]) -> tuple[Tensor]:
        attention = self.attention.self
        bias = attention.relative_position_bias_table[attention.relative_position_index.flatten()]
        attended = _attend(
            self,
            self.layernorm_before(hidden_states),
            size,
            (attention.query, attention.key, attention.value),
            bias.unflatten(0, (self.window_size**2, -1)).permute(2, 0, 1),
            attention.attention_head_size,
        )
        hidden_states = hidden_states + self.drop_path(self.attention.output(attended, hidden_states))
        return (hidden_states + self.output(self.intermediate(self.layernorm_after(hidden_states))),)


class MaskFormerSwinLayer(_SwinCopy):
    """Runs MaskFormer's copy, whose windows never shrink."""

    classes = frozenset(("transformers.models.maskformer.modeling_maskformer_swin.MaskFormerSwinLayer",))

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or not self._can_run():
            return super().forward(hidden_states, input_dimensions, output_attentions)
        return self._run(hidden_states, input_dimensions)


class DonutSwinLayer(_SwinCopy):
    """Runs Donut's and CLAP's copies."""

    classes = frozenset(
        (
            "transformers.models.donut.modeling_donut_swin.DonutSwinLayer",
            "transformers.models.clap.modeling_clap.ClapAudioLayer",
        )
    )
    parts = (*_SwinCopy.parts, "set_shift_and_window_size")

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool = False,
        always_partition: bool = False,
    ) -> tuple[Tensor, ...]:
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        if output_attentions or not self._can_run():
            return super().forward(hidden_states, input_dimensions, output_attentions, always_partition)
        return self._run(hidden_states, input_dimensions)


def _fits(layer: nn.Module, window: tuple[int, int]) -> bool:
    """Tell whether the layer's window is the one its table of biases is for: on a small map the window is smaller."""
    same = tuple(window) == (layer.window_size, layer.window_size)
    return same and not torch.jit.is_tracing() and not layer.is_watched()


def _attend(
    layer: nn.Module,
    x: Tensor,
    size: tuple[int, int],
    projections: tuple[nn.Module, nn.Module, nn.Module],
    bias: Tensor,
    head_dim: int,
    scale: float | None = None,
) -> Tensor:
    """Attend: ``x`` [B, H · W, C], ``bias`` [heads, window², window²] → [B, H · W, C], before the last projection."""
    heads = (-1, head_dim)
    q, k, v = (project(x).unflatten(1, size).unflatten(-1, heads) for project in projections)
    pads = {}
    if any(length % layer.window_size for length in size):
        zeros = x.new_zeros(1, x.shape[-1])  # the model fills the map up with these
        pads = {
            name: project(zeros)[0].unflatten(-1, heads)
            for name, project in zip(("pad_key", "pad_value"), projections[1:], strict=True)
        }
    return window_attention(q, k, v, bias, layer.window_size, shift=layer.shift_size, scale=scale, **pads).flatten(1, 2)
