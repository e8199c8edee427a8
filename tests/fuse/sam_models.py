"""Tiny image encoders with decomposed relative positions, from the configs of transformers."""

from __future__ import annotations

import transformers
from fused_models import random_weights
from torch import nn
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2SamVisionConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import DeepseekOcr2SamVisionEncoder
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig
from transformers.models.got_ocr2.modeling_got_ocr2 import GotOcr2VisionEncoder
from transformers.models.pp_formulanet.configuration_pp_formulanet import PPFormulaNetVisionConfig
from transformers.models.pp_formulanet.modeling_pp_formulanet import PPFormulaNetVisionModel
from transformers.models.slanext.configuration_slanext import SLANeXtVisionConfig
from transformers.models.slanext.modeling_slanext import SLANeXtVisionEncoder
from transformers.models.unlimited_ocr.configuration_unlimited_ocr import UnlimitedOcrSamVisionConfig
from transformers.models.unlimited_ocr.modeling_unlimited_ocr import UnlimitedOcrSamVisionEncoder

SIDE = 10  # of the maps: no multiple of the window
_VIT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 8 * SIDE}
_SAM = {"window_size": 4, "global_attn_indexes": [1], "mlp_dim": 32, "output_channels": 8}
_VIT_DET = {"window_size": 4, "window_block_indices": [0, 2], "residual_block_indices": [2]}
_SEG_GPT = {"merge_index": 0, "intermediate_hidden_state_indices": [1], "decoder_hidden_size": 8, "mlp_dim": 32}
_SQUARE = {"image_size": (8 * SIDE, 8 * SIDE), "pretrain_image_size": 40}
MODELS = {
    "sam": (transformers.SamVisionModel, transformers.SamVisionConfig, _SAM),
    "sam_hq": (transformers.SamHQVisionModel, transformers.SamHQVisionConfig, _SAM),
    "got_ocr2": (GotOcr2VisionEncoder, GotOcr2VisionConfig, _SAM),
    "slanext": (SLANeXtVisionEncoder, SLANeXtVisionConfig, _SAM),
    "pp_formulanet": (PPFormulaNetVisionModel, PPFormulaNetVisionConfig, _SAM | {"output_channels": 256}),
    "deepseek_ocr2": (DeepseekOcr2SamVisionEncoder, DeepseekOcr2SamVisionConfig, _SAM),
    "unlimited_ocr": (UnlimitedOcrSamVisionEncoder, UnlimitedOcrSamVisionConfig, _SAM),
    "vitdet": (
        transformers.VitDetModel,
        transformers.VitDetConfig,
        _VIT_DET | {"use_relative_position_embeddings": True, "pretrain_image_size": 8 * SIDE},
    ),
    "seggpt": (transformers.SegGptModel, transformers.SegGptConfig, _SEG_GPT | _SQUARE),
}


def build(kind: str, **options) -> nn.Module:
    """Make a model whose layers 0 and 2 have windows, but for SegGPT's, and layer 1 has none."""
    model, config, own = MODELS[kind]
    return random_weights(model(config(**(_VIT | own | options))))


def build_layer(kind: str, index: int, **options) -> nn.Module:
    """Make layer ``index`` of such a model; of SegGPT its attention."""
    layers = next(m for m in build(kind, **options).modules() if isinstance(m, nn.ModuleList))
    return layers[index].attention if kind == "seggpt" else layers[index]
