"""Builds the small models for handwritten digits from Grounding DINO's and SAM's own classes, a hundredth in size."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertTokenizer,
    ConvNextConfig,
    GroundingDinoConfig,
    GroundingDinoModel,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from fastcss.data.digits import CLASSES
from fastcss.models.class_detector import ClassDetector
from fastcss.models.phrases import ADJECTIVES
from fastcss.models.sam import SamSegmenter

DIM = 64  # of the detector's tokens and of SAM's embeddings and prompts
DETECTOR_SIDE, SAM_SIDE = 64, 128  # pixels of a scene as each of them reads it
GLYPHS = 600
_WORDS, _DIGITS, _GLYPHS = 110, 200, 300  # word ids; transformers looks for BERT's special tokens at their own


def detector() -> ClassDetector:
    """Build ConvNeXt, two levels of strides 8 and 16, and three layers of the feature enhancer; random weights.

    It is not Swin, which from random weights learns nothing of a digit's shape in the minutes that ConvNeXt needs.
    """
    backbone = ConvNextConfig(
        hidden_sizes=[24, 48, 64, 96], depths=[1, 1, 2, 2], patch_size=2, layer_scale_init_value=1.0,
        out_features=["stage3", "stage4"],
    )  # fmt: skip
    text = BertConfig(
        vocab_size=_GLYPHS + GLYPHS + 130, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config = GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=DIM, num_feature_levels=2, max_text_len=16,
        encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=2 * DIM, decoder_layers=1,
        decoder_attention_heads=1, decoder_ffn_dim=1, num_queries=1, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, fusion_dropout=0.0, fusion_droppath=0.0,
    )  # fmt: skip
    model = ClassDetector(GroundingDinoModel(config))
    for module in model.backbone.modules():  # transformers' initialisation is for larger widths
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.reset_parameters()
    for name, parameter in model.named_parameters():
        if name.endswith(("vision_param", "text_param")):
            nn.init.constant_(parameter, 0.5)
    return model


def segmenter() -> SamSegmenter:
    """Build a ViT of three layers on 16×16 patches, and SAM's decoder; random weights."""
    vision = SamVisionConfig(
        hidden_size=DIM, output_channels=DIM, num_hidden_layers=3, num_attention_heads=4, mlp_dim=2 * DIM,
        image_size=SAM_SIDE, patch_size=8, window_size=8, global_attn_indexes=[1], num_pos_feats=DIM // 2,
    )  # fmt: skip
    prompts = SamPromptEncoderConfig(hidden_size=DIM, image_size=SAM_SIDE, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=DIM, mlp_dim=2 * DIM, num_attention_heads=4, iou_head_hidden_dim=DIM)
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
            module.reset_parameters()
    with torch.no_grad():
        model.vision_encoder.pos_embed.copy_(0.5 * _sines(model.vision_encoder.pos_embed.shape[1], DIM))
        # transformers draws these for a checkpoint to replace: at its high frequencies even neighbours share nothing.
        frequencies = 0.7 * torch.randn(2, DIM // 2)
        for embedding in (model.shared_image_embedding, model.prompt_encoder.shared_embedding):
            embedding.positional_embedding.copy_(frequencies)
    return SamSegmenter(model)


def tokenizer() -> BertTokenizer:
    """Build a tokenizer of whole words: the default adjectives, the digits' names, and glyph1, glyph2, …"""
    words = [f"[unused{i}]" for i in range(_GLYPHS + GLYPHS + 130)]
    words[0], words[100:104] = "[PAD]", ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for first, named in ((_WORDS, ADJECTIVES), (_DIGITS, CLASSES[1:]), (_GLYPHS, glyph_names())):
        words[first : first + len(named)] = named
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
        return BertTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=16)


def glyph_names() -> list[str]:
    return [f"glyph{label}" for label in range(1, GLYPHS + 1)]


@torch.no_grad()
def name_digits(model: ClassDetector) -> None:
    """Draw embeddings for the digits' names, distributed as those of the glyphs' names: no word tells how it looks."""
    table = model.text_backbone.embeddings.word_embeddings.weight
    known = table[_GLYPHS : _GLYPHS + GLYPHS]
    spread = torch.linalg.cholesky(known.T.cov() + 1e-6 * torch.eye(known.shape[1]))
    table[_DIGITS : _DIGITS + 10] = known.mean(0) + torch.randn(10, known.shape[1]) @ spread.T


def _sines(side: int, width: int) -> Tensor:
    """Compute sines and cosines of rows and of columns, [1, side, side, width]."""
    frequencies = 1.5 * 100 ** -(torch.arange(width // 4) / (width // 4))
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)  # [side, width / 2]
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], -1)[None]
