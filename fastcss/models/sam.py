"""Runs the Segment Anything Model as DecoupleCSS uses it: one embedding per image, then all of its prompts at once."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from .checkpoint import load_pretrained

#: The published models have image encoders of these (width, layers, heads).
VITS = {"vit-b": (768, 12, 12), "vit-l": (1024, 24, 16), "vit-h": (1280, 32, 16)}


class Masks(NamedTuple):
    """Holds the decoder's masks for R prompts.

    Attributes:
        masks: ``[R, 4h, 4w]``, logits, for an embedding of h × w.
        scores: ``[R]``, the decoder's own estimate of each mask's IoU.
    """

    masks: Tensor
    scores: Tensor


class SamSegmenter(nn.Module):
    """Runs a ``transformers.SamModel`` that is prompted with embeddings instead of points and boxes."""

    def __init__(self, model: SamModel) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def from_folder(cls, folder: str | Path) -> SamSegmenter:
        """Load the model from a checkpoint folder of transformers, in float32; safetensors only, no network."""
        return cls(load_pretrained(SamModel, folder, dtype=torch.float32)).eval()

    @classmethod
    def random(cls, size: str = "vit-b", *, seed: int = 0) -> SamSegmenter:
        """Make a model with random weights that are so large that a mask depends on its prompt, as in a trained model.

        Args:
            size: "vit-b", "vit-l" or "vit-h", the shapes of the published models (DecoupleCSS's storage tells that it
                has "vit-h"); or "tiny", for tests.
            seed: seed of the weights; the global generator is left as it was.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SamModel(_config(size))
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
                    module.reset_parameters()
            return cls(model).eval()

    @property
    def image_size(self) -> int:
        """Return the side of the square picture that the encoder takes."""
        return self.model.config.vision_config.image_size

    @property
    def prompt_dim(self) -> int:
        """Return the width D of a prompt's embeddings."""
        return self.model.config.prompt_encoder_config.hidden_size

    def mask_crop(self, crop: tuple[int, int]) -> tuple[int, int]:
        """Return the part of a fourfold enlarged mask that belongs to a picture that fills ``crop`` of SAM's square.

        ``merge_masks`` counts in that enlarged mask. With the published patches of 16 pixels it equals ``crop``.
        """
        patch = self.model.config.vision_config.patch_size
        return tuple(round(16 * length / patch) for length in crop)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Embed pictures ``[B, 3, S, S]`` with ``S = image_size`` → ``[B, D, h, w]``."""
        return self.model.vision_encoder(pixel_values).last_hidden_state

    def decode(self, embedding: Tensor, prompts: Tensor) -> Masks:
        """Decode the masks of R prompts in one image, as ``SamModel`` does, but compute what the prompts share once.

        Args:
            embedding: ``[D, h, w]``, one image of ``embed``.
            prompts: ``[R, m, D]``, m embeddings per prompt.
        """
        decoder = self.model.mask_decoder
        height, width = embedding.shape[-2:]
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts.to(own.dtype)], dim=1)  # [R, n, D]
        image = embedding[None] + self.model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        image = image.flatten(2).transpose(1, 2)  # [1, h · w, D]
        places = self.model.get_image_wide_positional_embeddings().flatten(2).transpose(1, 2)
        queries, keys = _two_way(decoder.transformer, tokens, image, places)

        maps = keys.transpose(1, 2).unflatten(2, (height, width))
        maps = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(maps)))
        maps = decoder.activation(decoder.upscale_conv2(maps))
        weights = decoder.output_hypernetworks_mlps[0](queries[:, 1])  # the mask of a prompt that means one object
        masks = (weights[:, None] @ maps.flatten(2)).view(len(prompts), *maps.shape[-2:])
        return Masks(masks, decoder.iou_prediction_head(queries[:, 0])[:, 0])


def _two_way(transformer: nn.Module, tokens: Tensor, image: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Let tokens [R, n, D] and one image [1, N, D] read each other → [R, n, D], [R, N, D].

    The first block reads the same image for every prompt, so its keys and values, and its queries on the way back, are
    made once. From then on each prompt has an image of its own.
    """
    queries = tokens
    for i, block in enumerate(transformer.layers):
        if block.skip_first_layer_pe:
            queries = _attend(block.self_attn, queries, queries, queries)
        else:
            query = queries + tokens
            queries = queries + _attend(block.self_attn, query, query, queries)
        queries = block.layer_norm1(queries)
        read = block.cross_attn_token_to_image
        if i == 0:  # all prompts' tokens form one sequence, since none reads another here
            attended = _attend(read, (queries + tokens).flatten(0, 1)[None], image + places, image)[0]
            attended = attended.view(queries.shape)
        else:
            attended = _attend(read, queries + tokens, image + places, image)
        queries = block.layer_norm2(queries + attended)
        queries = block.layer_norm3(queries + block.mlp(queries))
        image = image + _attend(block.cross_attn_image_to_token, image + places, queries + tokens, queries)
        image = block.layer_norm4(image)
    read = transformer.final_attn_token_to_image
    queries = queries + _attend(read, queries + tokens, image + places, image)
    return transformer.layer_norm_final_attn(queries), image


def _attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run SamAttention on [R or 1, ·, D]; project a tensor with a batch of one only once."""
    heads = (attention.num_attention_heads, -1)
    q, k, v = (
        project(x).unflatten(2, heads).transpose(1, 2)
        for project, x in ((attention.q_proj, query), (attention.k_proj, key), (attention.v_proj, value))
    )
    batch = q.shape[0] if k.shape[0] == 1 else k.shape[0]
    q, k, v = (x.expand(batch, -1, -1, -1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=attention.scaling)
    return attention.out_proj(out.transpose(1, 2).flatten(2))


def _config(size: str) -> SamConfig:
    if size in VITS:
        width, layers, heads = VITS[size]
        whole = [layers * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]  # the layers that read the whole picture
        return SamConfig(
            vision_config=SamVisionConfig(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, global_attn_indexes=whole
            )
        )
    if size == "tiny":
        vision = SamVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=128, patch_size=8, mlp_dim=64,
            output_channels=32, num_pos_feats=16, window_size=4, global_attn_indexes=[1],
        )  # fmt: skip
        prompt = SamPromptEncoderConfig(hidden_size=32, image_size=128, patch_size=8, mask_input_channels=4)
        decoder = SamMaskDecoderConfig(hidden_size=32, mlp_dim=64, num_attention_heads=4, iou_head_hidden_dim=32)
        return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    raise ValueError(f"SamSegmenter: size must be one of {', '.join(VITS)}, tiny, got {size!r}")
