"""Tests SamSegmenter against transformers' own SamModel, and what it computes once for all prompts."""

from __future__ import annotations

import collections
import copy
import functools
import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import SamConfig, SamModel, SamVisionConfig

from benchmarks import measure
from fastcss.models import sam
from fastcss.models.sam import Masks, SamSegmenter

EXACT = 1e-5  # float32, of the largest value: the sums are SamModel's in another order


@pytest.fixture(scope="module")
def segmenter(device) -> SamSegmenter:
    return SamSegmenter.random("tiny").to(device).requires_grad_(False)


def embeddings_and_prompts(segmenter: SamSegmenter, *counts: int, prompts: int = 6) -> tuple[Tensor, Tensor]:
    """Make an embedding for each count, and so many prompts for it, of which none depends on the images before."""
    made = []
    for b, count in enumerate(counts):
        generator = torch.Generator().manual_seed(10 * b + count)
        pixels = torch.randn(1, 3, 128, 128, generator=generator)
        made.append((pixels, torch.randn(count, prompts, segmenter.prompt_dim, generator=generator)))
    pixels, given = (torch.cat(part).to(segmenter.model.device) for part in zip(*made, strict=True))
    return segmenter.embed(pixels), given


def theirs(segmenter: SamSegmenter, embeddings: Tensor, prompts: Tensor, counts: Sequence[int]) -> Masks:
    """Run SamModel.mask_decoder image by image, on sparse prompts that are embeddings already."""
    model, found = segmenter.model, []
    dense = model.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand(1, -1, *embeddings.shape[-2:])
    places = model.get_image_wide_positional_embeddings()
    for embedding, own in zip(embeddings[:, None], prompts.split(list(counts)), strict=True):
        if len(own):
            masks, scores = model.mask_decoder(embedding, places, own[None], dense, multimask_output=False)[:2]
            found.append(Masks(masks[0, :, 0], scores[0, :, 0]))
    return Masks(*map(torch.cat, zip(*found, strict=True)))


@pytest.fixture
def few_at_once(segmenter, monkeypatch):
    """Lets so many prompts have an image of their own at a time; the tiny images would all fit."""

    def limit(prompts: int) -> None:
        numbers = segmenter.prompt_dim * segmenter.model.config.prompt_encoder_config.image_embedding_size**2
        monkeypatch.setattr(sam, "AT_ONCE", dict.fromkeys(sam.AT_ONCE, prompts * numbers))

    return limit


def assert_close(got: Tensor, expected: Tensor, tolerance: float = EXACT) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= tolerance * expected.abs().max()


COUNTS = ((1,), (5,), (2, 0, 3, 1))


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("counts", COUNTS)
def test_decode_equals_sam_model(segmenter, few_at_once, counts, at_once):
    few_at_once(at_once)
    embeddings, given = embeddings_and_prompts(segmenter, *counts)
    expected = theirs(segmenter, embeddings, given, counts)
    for part, wanted in zip(segmenter.decode(embeddings, given, counts=counts), expected, strict=True):
        assert_close(part, wanted)


@pytest.mark.parametrize("at_once", [1, 2, 100])
@pytest.mark.parametrize("counts", COUNTS)
def test_gradients_are_those_of_sam_model(segmenter, few_at_once, counts, at_once):
    """Compare in float64, as a weight's gradient is a sum over all pixels in which most cancels."""
    few_at_once(at_once)
    learning = copy.deepcopy(segmenter).double().requires_grad_(True)
    inputs = [leaf.double().requires_grad_() for leaf in embeddings_and_prompts(segmenter, *counts, prompts=1)]
    own = dict(learning.model.mask_decoder.named_parameters())
    own["no_mask_embed"] = learning.model.prompt_encoder.no_mask_embed.weight
    found = []
    for decode in (learning.decode, functools.partial(theirs, learning)):
        masks, scores = decode(*inputs, counts=counts)
        # All elements have different weights, as a plain sum hides errors that cancel.
        weights = torch.linspace(-1, 1, masks.numel(), device=masks.device).view_as(masks)
        loss = (masks * weights).sum() + scores.sum()
        found.append(torch.autograd.grad(loss, (*inputs, *own.values()), materialize_grads=True))
    largest = max(gradient.abs().max() for gradient in found[1])
    for name, got, expected in zip(["embeddings", "prompts", *own], *found, strict=True):
        if name.endswith("k_proj.bias"):  # what all keys share drops out of a softmax, so both are rounding
            assert torch.stack([got, expected]).abs().max() <= 1e-12 * largest
        else:
            assert expected.any() != (re.search(r"mlps\.[1-9]", name) is not None), name  # masks of several objects
            assert_close(got, expected, 1e-12)


def test_masks_depend_on_their_prompts_and_images(segmenter):
    """The masks must depend on both; otherwise no test above would tell one prompt or image from another."""
    embeddings, prompts = embeddings_and_prompts(segmenter, 5, 0)
    masks, scores = segmenter.decode(embeddings, prompts, counts=[5, 0])
    assert masks.std(0).mean() > 0.1 * masks.std()
    assert len(scores.unique()) == 5
    other = segmenter.decode(embeddings, prompts, counts=[0, 5])
    assert (other.masks - masks).std() > 0.1 * masks.std()


@pytest.mark.parametrize("counts", [(0,), (0, 0), ()])
def test_no_prompts_are_no_masks(segmenter, counts):
    embeddings, prompts = embeddings_and_prompts(segmenter, 0, 0)
    prompts.requires_grad_()
    masks, scores = segmenter.decode(embeddings[: len(counts)], prompts, counts=counts)
    assert masks.shape == (0, 64, 64)
    assert scores.shape == (0,)
    (gradient,) = torch.autograd.grad(masks.sum() + scores.sum(), prompts)
    assert gradient.shape == prompts.shape


def test_a_prompt_does_not_see_the_others(segmenter, few_at_once):
    """It must be alone what it is among others: to the last bit if it has its images alone, as at full size."""
    counts = (2, 0, 3)
    embeddings, prompts = embeddings_and_prompts(segmenter, *counts)
    within_rounding = segmenter.decode(embeddings, prompts, counts=counts)
    few_at_once(1)
    together, r = segmenter.decode(embeddings, prompts, counts=counts), 0
    for embedding, count in zip(embeddings[:, None], counts, strict=True):
        for _ in range(count):
            for got, same, close in zip(
                segmenter.decode(embedding, prompts[r : r + 1]), together, within_rounding, strict=True
            ):
                assert torch.equal(got, same[r : r + 1])
                assert_close(got, close[r : r + 1])
            r += 1


def test_what_prompts_share_is_computed_once(segmenter, few_at_once):
    few_at_once(2)
    counts = (5, 0, 1)
    embeddings, prompts = embeddings_and_prompts(segmenter, *counts)
    transformer, rows = segmenter.model.mask_decoder.transformer, collections.Counter()

    def watch(name: str):
        return lambda module, inputs, _: rows.update({name: inputs[0].shape[:2].numel()})

    hooks = [m.register_forward_hook(watch(name)) for name, m in transformer.named_modules() if name.endswith("_proj")]
    segmenter.decode(embeddings, prompts, counts=counts)
    for hook in hooks:
        hook.remove()
    pixels = embeddings[0, 0].numel()
    first, second = ("layers.0.cross_attn", "layers.1.cross_attn")
    assert rows[f"{first}_token_to_image.k_proj"] == rows[f"{first}_token_to_image.v_proj"] == 2 * pixels
    assert rows[f"{first}_image_to_token.q_proj"] == 2 * pixels
    assert rows[f"{second}_token_to_image.k_proj"] == 6 * pixels


@torch.no_grad()
def test_many_prompts_take_the_memory_of_few():
    """At full size each prompt's image and its enlarged maps take 24 MiB, and its mask a quarter of one."""
    config = SamConfig(vision_config=SamVisionConfig(hidden_size=8, num_hidden_layers=0, global_attn_indexes=[]))
    segmenter = SamSegmenter(SamModel(config).eval())
    embeddings, prompts = torch.randn(2, 256, 64, 64), torch.randn(6, 6, 256)
    peak = [
        measure.peak_mib(lambda given=given: segmenter.decode(embeddings, prompts[: sum(given)], counts=given), "cpu")
        for given in ([1, 0], [3, 3])
    ]
    assert peak[1] <= peak[0] + 4  # the masks of five more, twice where they are put together; and an image more


@pytest.mark.parametrize(
    ("embeddings", "prompts", "counts", "message"),
    [
        ((32, 16, 16), (2, 6, 32), [2], "embeddings must be [B, D, h, w], got [32, 16, 16]"),
        ((1, 32, 16, 16), (2, 6, 31), [2], "prompts must be [R, m, D] with D = 32, got [2, 6, 31]"),
        ((1, 32, 8, 16), (2, 6, 32), [2], "embeddings must be [B, 32, 16, 16] with this model, got [1, 32, 8, 16]"),
        ((2, 32, 16, 16), (2, 6, 32), None, "counts must be a number from 0 for each of 2 images, 2 in all, got None"),
        ((2, 32, 16, 16), (2, 6, 32), [2], "got [2]"),
        ((2, 32, 16, 16), (2, 6, 32), [1, 2], "got [1, 2]"),
        ((2, 32, 16, 16), (2, 6, 32), [3, -1], "got [3, -1]"),
    ],
)
def test_what_does_not_fit_is_refused(segmenter, embeddings, prompts, counts, message):
    with pytest.raises(ValueError, match=rf"^SamSegmenter\.decode: .*{re.escape(message)}$"):
        segmenter.decode(torch.zeros(embeddings), torch.zeros(prompts), counts=counts)


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
