"""Makes the Grounding DINO encoder ready for ONNX."""

from __future__ import annotations

from unittest import mock

from torch import Tensor, nn

from ._onnx import OnnxModel

#: The exported model's weights have this before the encoder's own names.
PREFIX = "encoder."


class _Tensors(nn.Module):
    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        output = self.encoder(pixel_values=pixel_values, input_ids=input_ids)
        return output.last_hidden_state_vision, output.last_hidden_state_text


def onnx_model(encoder: nn.Module, pixel_values: Tensor, input_ids: Tensor) -> OnnxModel:
    """Make a model of pictures and ids that returns image tokens and text tokens.

    Which token reads which, and at what place in its phrase it is, is constant in it: ONNX has no operator for how
    transformers finds that out. All else is computed from the ids in every call, as in the other providers.
    """
    from fastcss.models import grounding_dino

    name = "generate_masks_with_special_tokens_and_transfer_map"
    found = getattr(grounding_dino, name)(input_ids, encoder.special_tokens)
    constant = mock.patch.object(grounding_dino, name, return_value=found)
    return OnnxModel(_Tensors(encoder).eval(), (pixel_values, input_ids), lambda: constant)
