"""Runs the Segment Anything Model as DecoupleCSS uses it: one embedding per image, then all of its prompts at once."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SamConfig, SamMaskDecoderConfig, SamModel, SamPromptEncoderConfig, SamVisionConfig

from .._ops._arguments import check_shapes
from .checkpoint import cast, check_dtype, load_pretrained
from .fused_copy import FusedCopy

#: The published models have image encoders of these (width, layers, heads).
VITS = {"vit-b": (768, 12, 12), "vit-l": (1024, 24, 16), "vit-h": (1280, 32, 16)}

#: So many numbers the images of prompts that are decoded together have at most: what a cache keeps on a CPU, and what
#: fills a GPU. A prompt's image has h · w · D of them, 2²⁰ with the published models.
AT_ONCE = {"cpu": 2**20, "cuda": 2**23}


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
        self._fused: FusedCopy | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_fused": None}  # a copy fuses its encoder anew

    @classmethod
    def from_folder(cls, folder: str | Path, *, dtype: torch.dtype = torch.float32) -> SamSegmenter:
        """Load the model from a checkpoint folder of transformers; safetensors only, no network.

        Args:
            folder: folder of the checkpoint.
            dtype: dtype to compute in, whatever the folder's; in 16 bits the frequencies of places stay in float32.
        """
        check_dtype("SamSegmenter.from_folder", dtype)
        model = load_pretrained(SamModel, folder, dtype=torch.float32)
        cast(model, dtype)
        return cls(model).eval()

    @classmethod
    def random(cls, size: str = "vit-b", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> SamSegmenter:
        """Make a model with random weights that are so large that a mask depends on its prompt, as in a trained model.

        Args:
            size: "vit-b", "vit-l" or "vit-h", the shapes of the published models (DecoupleCSS's storage tells that it
                has "vit-h"); or "tiny", for tests.
            seed: seed of the weights; the global generator is left as it was.
            dtype: as for ``from_folder``; the weights are drawn in float32.
        """
        check_dtype("SamSegmenter.random", dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = SamModel(_config(size))
            for module in model.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)):
                    module.reset_parameters()
        cast(model, dtype)
        return cls(model).eval()

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of pictures, embeddings and masks."""
        return self.model.mask_decoder.iou_token.weight.dtype

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

    def embed(self, pixel_values: Tensor, *, fused: bool = False) -> Tensor:
        """Embed pictures ``[B, 3, S, S]`` with ``S = image_size`` → ``[B, D, h, w]``.

        Args:
            pixel_values: the pictures, in the model's dtype.
            fused: True runs the encoder on the ops of ``fastcss.fuse``; the model keeps its own modules.
        """
        encoder = self.model.vision_encoder
        if not fused:
            return encoder(pixel_values).last_hidden_state
        if self._fused is None or not self._fused.is_of(encoder):
            self._fused = FusedCopy(encoder)
        return self._fused(pixel_values).last_hidden_state

    def decode(self, embeddings: Tensor, prompts: Tensor, *, counts: Sequence[int] | None = None) -> Masks:
        """Decode the masks of all prompts of all images, as ``SamModel`` does, but compute what prompts share once.

        After the decoder's first block each prompt has a copy of its image. ``AT_ONCE`` says how many prompts have
        theirs at a time, so that without gradients R prompts take the memory of so many, and their masks. On a CPU that
        is one with the published models: its mask is the same to the last bit whatever else is decoded. Elsewhere other
        prompts change it by rounding at most.

        Args:
            embeddings: ``[B, D, h, w]``, from ``embed``.
            prompts: ``[R, m, D]``, m embeddings per prompt; first those of the first image, and so on.
            counts: how many prompts each image has: B numbers from 0 that add up to R. A single image has all of them
                by default.

        Returns:
            The masks in the order of ``prompts``; none if there are no prompts.

        Raises:
            TypeError, ValueError: the tensors have other shapes, or the counts do not fit them.
        """
        counts = self._counts(embeddings, prompts, counts)
        prompts = prompts.to(self.dtype)
        at_once = max(1, AT_ONCE.get(embeddings.device.type, AT_ONCE["cuda"]) // math.prod(embeddings.shape[1:]))
        prompted, found = [b for b, count in enumerate(counts) if count], []
        for first in range(0, max(1, len(prompted)), at_once):  # no prompts are one empty group
            images = prompted[first : first + at_once]
            shared = self._share(embeddings[images])
            owners = [i for i, b in enumerate(images) for _ in range(counts[b])]
            mine, prompts = prompts.tensor_split([len(owners)])
            for start in range(0, max(1, len(owners)), at_once):
                some = slice(start, start + at_once)
                found.append(self._decode(shared.of(owners[some]), mine[some], embeddings.shape[2:]))
        return Masks(*map(torch.cat, zip(*found, strict=True)))

    def _share(self, embeddings: Tensor) -> _Image:
        """Make what the prompts of an image share: the first block reads the same image for all of them."""
        block = self.model.mask_decoder.transformer.layers[0]
        image = embeddings + self.model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1)
        image = image.flatten(2).transpose(1, 2)
        places = self.model.get_image_wide_positional_embeddings().flatten(2).transpose(1, 2).to(image.dtype)
        read, back = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        return _Image(image, places, read.k_proj(image + places), read.v_proj(image), back.q_proj(image + places))

    def _decode(self, shared: _Image, prompts: Tensor, size: Sequence[int]) -> Masks:
        decoder = self.model.mask_decoder
        own = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        tokens = torch.cat([own.expand(len(prompts), -1, -1), prompts], dim=1)  # [R, n, D]
        queries, image = _two_way(decoder.transformer, tokens, shared)
        maps = image.unflatten(1, tuple(size)).permute(0, 3, 1, 2)  # in these strides torch keeps the channels last
        maps = decoder.activation(decoder.upscale_layer_norm(decoder.upscale_conv1(maps)))
        maps = decoder.activation(decoder.upscale_conv2(maps))
        weights = decoder.output_hypernetworks_mlps[0](queries[:, 1])  # the mask of a prompt that means one object
        masks = (weights[:, None] @ maps.flatten(2)).view(len(prompts), *maps.shape[-2:])
        return Masks(masks, decoder.iou_prediction_head(queries[:, 0])[:, 0])

    def _counts(self, embeddings: Tensor, prompts: Tensor, counts: Sequence[int] | None) -> list[int]:
        """Check the arguments of ``decode``, and return how many prompts each image has."""
        op, side = "SamSegmenter.decode", self.model.config.prompt_encoder_config.image_embedding_size
        sizes = check_shapes(op, embeddings=(embeddings, "B D h w"), prompts=(prompts, "R m D"))
        if [sizes["D"], sizes["h"], sizes["w"]] != [self.prompt_dim, side, side]:
            wanted = f"[B, {self.prompt_dim}, {side}, {side}]"
            raise ValueError(f"{op}: embeddings must be {wanted} with this model, got {list(embeddings.shape)}")
        given = [sizes["R"]] if counts is None else [operator.index(count) for count in counts]
        if len(given) != sizes["B"] or min(given, default=0) < 0 or sum(given) != sizes["R"]:
            wanted = f"a number from 0 for each of {sizes['B']} images, {sizes['R']} in all"
            raise ValueError(f"{op}: counts must be {wanted}, got {counts}")
        return given


class _Image(NamedTuple):
    """Holds what the prompts of G images share in the decoder: the images' tokens, and projections of them."""

    tokens: Tensor  # [G, N, D]
    places: Tensor  # [1, N, D]
    keys: Tensor  # [G, N, d], read by the first block's tokens
    values: Tensor  # [G, N, d]
    queries: Tensor  # [G, N, d], with which the first block's image reads the tokens

    def of(self, owners: Sequence[int]) -> _Image:
        """Return it for one prompt after the other, of the images ``owners``: a view, if that is one image."""
        if len(set(owners)) == 1:
            one = slice(owners[0], owners[0] + 1)
            tokens, keys, values, queries = (
                x[one].expand(len(owners), -1, -1) for x in (self.tokens, self.keys, self.values, self.queries)
            )
        else:
            index = torch.tensor(owners, dtype=torch.long, device=self.tokens.device)
            tokens, keys, values, queries = (x[index] for x in (self.tokens, self.keys, self.values, self.queries))
        return _Image(tokens, self.places, keys, values, queries)


def _two_way(transformer: nn.Module, tokens: Tensor, shared: _Image) -> tuple[Tensor, Tensor]:
    """Let tokens [R, n, D] and the image of each read each other → [R, n, D], [R, N, D]."""
    queries, image, places = tokens, shared.tokens, shared.places
    for i, block in enumerate(transformer.layers):
        if block.skip_first_layer_pe:
            queries = _attend(block.self_attn, queries, queries, queries)
        else:
            query = queries + tokens
            queries = queries + _attend(block.self_attn, query, query, queries)
        queries = block.layer_norm1(queries)
        read, back = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        if i == 0:
            attended = _attention(read, read.q_proj(queries + tokens), shared.keys, shared.values)
        else:
            placed = image + places
            attended = _attend(read, queries + tokens, placed, image)
        queries = block.layer_norm2(queries + attended)
        queries = block.layer_norm3(queries + block.mlp(queries))
        query = shared.queries if i == 0 else back.q_proj(placed)
        image = image + _attention(back, query, back.k_proj(queries + tokens), back.v_proj(queries))
        image = block.layer_norm4(image)
    queries = queries + _attend(transformer.final_attn_token_to_image, queries + tokens, image + places, image)
    return transformer.layer_norm_final_attn(queries), image


def _attend(attention: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Run SamAttention on [R, ·, D]."""
    return _attention(attention, attention.q_proj(query), attention.k_proj(key), attention.v_proj(value))


def _attention(attention: nn.Module, *projected: Tensor) -> Tensor:
    """Run SamAttention on its query, key and value as they are projected, [R, ·, d] → [R, ·, D]."""
    q, k, v = (x.unflatten(2, (attention.num_attention_heads, -1)).transpose(1, 2) for x in projected)
    if q.shape[2] > k.shape[2] and q.device.type == "cpu" and q.dtype.itemsize >= 4:
        # torch's kernel has vectors of keys, here a prompt's few tokens. These are of pixels, and take a quarter of it.
        weights = (attention.scaling * k @ q.mT).softmax(2)  # [R, heads, n, N]
        return attention.out_proj((v.mT @ weights).flatten(1, 2).mT)
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
