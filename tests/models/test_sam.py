"""Tests SamSegmenter against transformers' own SamModel, and what it computes once for all prompts."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastcss.models.sam import Masks, SamSegmenter

EXACT = 1e-5  # float32, of the largest value: the sums are SamModel's in another order


@pytest.fixture(scope="module")
def segmenter(device) -> SamSegmenter:
    return SamSegmenter.random("tiny").to(device).requires_grad_(False)


def embedding_and_prompts(segmenter: SamSegmenter, count: int, prompts: int = 6) -> tuple[Tensor, Tensor]:
    generator, device = torch.Generator().manual_seed(count), segmenter.model.device
    embedding = segmenter.embed(torch.randn(1, 3, 128, 128, generator=generator).to(device))[0]
    return embedding, torch.randn(count, prompts, segmenter.prompt_dim, generator=generator).to(device)


def theirs(segmenter: SamSegmenter, embedding: Tensor, prompts: Tensor) -> Masks:
    """Run SamModel.mask_decoder on sparse prompts that are embeddings already."""
    model = segmenter.model
    dense = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, *embedding.shape[-2:])
    places = model.get_image_wide_positional_embeddings()
    masks, scores = model.mask_decoder(embedding[None], places, prompts[None], dense, multimask_output=False)[:2]
    return Masks(masks[0, :, 0], scores[0, :, 0])


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("prompts", [1, 6])
@pytest.mark.parametrize("count", [1, 5])
def test_decode_equals_sam_model(segmenter, count, prompts):
    embedding, given = embedding_and_prompts(segmenter, count, prompts)
    found = []
    for decode in (segmenter.decode, lambda *inputs: theirs(segmenter, *inputs)):
        leaves = embedding.clone().requires_grad_(), given.clone().requires_grad_()
        masks, scores = decode(*leaves)
        # All elements have different weights, as a plain sum hides errors that cancel.
        loss = (masks * torch.linspace(-1, 1, masks.numel(), device=masks.device).view_as(masks)).sum() + scores.sum()
        found.append([masks.detach(), scores.detach(), *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*found, strict=True):
        assert expected.abs().max() > 0
        assert_close(got, expected)


def test_masks_depend_on_their_prompts(segmenter):
    """The masks must depend on the prompts; otherwise no test above would tell one prompt from another."""
    masks, scores = segmenter.decode(*embedding_and_prompts(segmenter, 5))
    assert masks.std(0).mean() > 0.1 * masks.std()
    assert len(scores.unique()) == 5


def test_no_prompts_are_no_masks(segmenter):
    embedding, prompts = embedding_and_prompts(segmenter, 0)
    prompts.requires_grad_()
    masks, scores = segmenter.decode(embedding, prompts)
    assert masks.shape == (0, 64, 64)
    assert scores.shape == (0,)
    (gradient,) = torch.autograd.grad(masks.sum() + scores.sum(), prompts)
    assert gradient.shape == prompts.shape


def test_a_prompt_does_not_see_the_others(segmenter):
    embedding, prompts = embedding_and_prompts(segmenter, 5)
    together = segmenter.decode(embedding, prompts)
    for r in range(5):
        for got, expected in zip(segmenter.decode(embedding, prompts[r : r + 1]), together, strict=True):
            assert_close(got, expected[r : r + 1])


def test_what_prompts_share_is_computed_once(segmenter):
    embedding, prompts = embedding_and_prompts(segmenter, 5)
    transformer, rows = segmenter.model.mask_decoder.transformer, {}

    def watch(name: str):
        return lambda module, inputs, _: rows.update({name: inputs[0].shape[:2].numel()})

    hooks = [m.register_forward_hook(watch(name)) for name, m in transformer.named_modules() if name.endswith("_proj")]
    flops = []
    for count in (1, 5):
        with FlopCounterMode(display=False) as counter:
            segmenter.decode(embedding, prompts[:count])
        flops.append(counter.get_total_flops())
    for hook in hooks:
        hook.remove()
    assert flops[1] < 5 * flops[0]
    pixels = embedding[0].numel()
    first, second = ("layers.0.cross_attn", "layers.1.cross_attn")
    assert rows[f"{first}_token_to_image.k_proj"] == rows[f"{first}_token_to_image.v_proj"] == pixels
    assert rows[f"{first}_image_to_token.q_proj"] == pixels
    assert rows[f"{second}_token_to_image.k_proj"] == 5 * pixels
    once = transformer.layers[0].cross_attn_token_to_image, transformer.layers[0].cross_attn_image_to_token
    matrices = [once[0].k_proj.weight, once[0].v_proj.weight, once[1].q_proj.weight]
    matrices.append(segmenter.model.shared_image_embedding.positional_embedding)  # of the pixels' places
    assert flops[1] == 5 * flops[0] - 4 * sum(2 * pixels * matrix.numel() for matrix in matrices)


def test_embed_equals_sam_model(segmenter, device):
    pixels = torch.randn(3, 3, 128, 128, device=device)
    assert torch.equal(segmenter.embed(pixels), segmenter.model.get_image_embeddings(pixels))
    assert (segmenter.image_size, segmenter.prompt_dim) == (128, 32)


def test_folder_round_trip(segmenter, tmp_path):
    segmenter.model.save_pretrained(tmp_path)
    assert [file.suffix for file in tmp_path.glob("model*")] == [".safetensors"]
    loaded = SamSegmenter.from_folder(str(tmp_path))
    assert not loaded.training
    state = segmenter.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name].cpu()) for name, tensor in loaded.state_dict().items())


def test_a_pickle_is_not_read(segmenter, tmp_path):
    segmenter.model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(segmenter.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=re.escape("model.safetensors")):
        SamSegmenter.from_folder(str(tmp_path))


def test_random_weights_hang_on_the_seed_alone():
    before = torch.get_rng_state()
    first, same, other = (SamSegmenter.random("tiny", seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(same[name], tensor) for name, tensor in first.items())
    name = "model.mask_decoder.iou_token.weight"
    assert not torch.equal(other[name], first[name])
    with pytest.raises(ValueError, match="size must be one of vit-b, vit-l, vit-h, tiny, got 'huge'"):
        SamSegmenter.random("huge")
