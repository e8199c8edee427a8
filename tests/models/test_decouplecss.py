"""Tests DecoupleCSS in one pass against its sequential forms, and these against the models' own parts."""

from __future__ import annotations

import copy

import pytest
import torch
from decouplecss_models import AGREE, EXACT, SIZES, add_task, agreement, assert_alike, assert_close, build, pictures
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastcss.models.decouplecss import CONFIDENCES, MODES
from fastcss.models.grounding_dino import LORA_SITES
from fastcss.ops import select_tokens


@pytest.fixture(scope="module")
def models():
    """Builds models for tests that do not change them."""
    return {sites: build(sites=sites) for sites in ("swin+fusion", "fusion")}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sites", LORA_SITES)
@pytest.mark.filterwarnings("error:one_pass")  # it warns if it runs the tasks in turn
def test_all_modes_give_the_same_labels(sites, batch, device):
    model, given = build(sites=sites).to(device), pictures(batch, device)
    found = {mode: model.segment(**given, mode=mode) for mode in MODES}
    expected = found["literal"]
    for segmentation in found.values():
        assert_alike(segmentation, expected)
    assert_alike(model.segment(**given), expected)  # a call that measures nothing any more
    assert expected.present.shape == (batch, sum(SIZES))
    assert expected.present.any(1).all()  # and yet:
    assert not expected.present.all(1).any()
    assert (expected.presence - 0.101).abs().min() > 10 * EXACT  # no threshold hangs on rounding
    for labels, size, present in zip(expected.labels, given["sizes"], expected.present, strict=True):
        assert labels.shape == size
        assert labels.dtype == torch.int64
        seen = labels.unique().tolist()
        assert len(seen) > 4
        assert set(seen) <= {0, *(1 + present.nonzero()[:, 0]).tolist()}


@torch.no_grad()
@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_literal_is_what_the_parts_make(models, confidence):
    """The labels must be those of PEFT's model of each task, SAM's own decoder, and every mask at full size."""
    model, given = copy.deepcopy(models["swin+fusion"]), pictures(1)
    model.confidence = confidence
    sam = model.segmenter.model
    expected, score_of_best, k = torch.zeros(64, 96, dtype=torch.long), torch.full((64, 96), -torch.inf), 0
    embedding = sam.get_image_embeddings(given["sam_pixel_values"])
    dense = sam.prompt_encoder.no_mask_embed.weight.view(1, -1, 1, 1).expand_as(embedding)
    for task in model.tasks:
        model.detector.set_adapter(task.name)
        phrases = model.detector.get_base_model().embed_phrases(task.input_ids, task.attention_mask)
        tokens, classes, _ = model.detector(given["pixel_values"], phrases=phrases)
        found = select_tokens(tokens, classes, threshold=0.05, length=128, impl="reference")
        for own in range(len(task.classes)):
            k += 1
            if not found.presence[0, own] or found.presence[0, own] < task.thresholds[own]:
                continue
            prompt = task.generator(found.tokens[:, own], torch.tensor([own]))
            places = sam.get_image_wide_positional_embeddings()
            masks, scores = sam.mask_decoder(embedding, places, prompt[None], dense, multimask_output=False)[:2]
            padded = F.interpolate(masks[:, 0], (256, 256), mode="bilinear")  # two pixels for each of SAM's 128
            logits = F.interpolate(padded[..., :170, :256], (64, 96), mode="bilinear")[0, 0]
            threshold, score = task.thresholds[own].item(), scores.item()
            if confidence == "presence":
                score = (found.presence[0, own].item() - threshold) / (1 - threshold)
            wins = (logits > 0) & (score > score_of_best)
            expected[wins], score_of_best[wins] = k, score
    for mode in MODES:
        assert agreement(model.segment(**given, mode=mode).labels, [expected]) >= (1 if mode == "literal" else AGREE)
    model.confidence = next(other for other in CONFIDENCES if other != confidence)
    assert agreement(model.segment(**given).labels, [expected]) < AGREE  # it matters


def test_a_crop_is_the_corner_of_the_padded_picture(models):
    """The picture has twice SAM's size, so that nothing is resized after the crop."""
    given = pictures(1) | {"sizes": [(256, 256)], "crops": None}
    (whole,) = models["fusion"].segment(**given).labels
    (corner,) = models["fusion"].segment(**given | {"sizes": [(170, 140)], "crops": [(85, 70)]}).labels
    assert torch.equal(corner, whole[:170, :140])


def test_a_batch_is_its_pictures_one_by_one(models):
    given = pictures(3)
    together = models["swin+fusion"].segment(**given)
    for b in range(3):
        alone = models["swin+fusion"].segment(**{name: value[b : b + 1] for name, value in given.items()})
        assert torch.equal(alone.present[0], together.present[b])
        assert agreement(alone.labels, together.labels[b : b + 1]) >= 0.9999


def test_what_tasks_share_is_computed_once(models):
    model, given, flops = models["fusion"], pictures(3), {}
    for mode in MODES:
        model.segment(**given, mode=mode)  # the first pass measures, and embeds the phrases
        with FlopCounterMode(display=False) as counter:
            model.segment(**given, mode=mode)
        flops[mode] = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    tasks = len(SIZES)
    of_sam = {mode: counts["SamVisionEncoder"] for mode, counts in flops.items()}
    assert tasks * of_sam["shared"] == of_sam["literal"]
    for mode in ("one_pass", "shared"):  # torch does not count all of SAM's own attention
        with FlopCounterMode(display=False) as counter:
            model.segmenter.embed(given["sam_pixel_values"], fused=mode == "one_pass")
        assert of_sam[mode] == counter.get_total_flops()
    swin = flops["one_pass"]["ClassDetector.backbone"]  # 2% more than the model's own: its kernels count all products
    assert tasks * swin <= 1.05 * flops["shared"]["PeftModel.base_model.model.backbone"]


def test_phrases_are_embedded_once():
    model, given, calls = build((2, 1)), pictures(1), []
    model.detector.get_base_model().text_backbone.register_forward_hook(lambda *_: calls.append(1))
    for mode, count in (("one_pass", 2), ("one_pass", 2), ("shared", 2), ("literal", 4), ("literal", 6)):
        model.segment(**given, mode=mode)
        assert len(calls) == count


@pytest.mark.parametrize("mode", MODES)
def test_a_threshold_keeps_a_class_out(mode):
    model, given = build(), pictures(1)
    before = model.segment(**given, mode=mode)
    shown = [k for k in range(sum(SIZES)) if (before.labels[0] == 1 + k).any()]
    task, first = model.tasks[2], sum(SIZES[:2])
    k = next(k for k in shown if first <= k < first + SIZES[2])
    task.thresholds[k - first] = before.presence[0, k] + 0.01
    after = model.segment(**given, mode=mode)
    assert not after.present[0, k]
    assert not (after.labels[0] == 1 + k).any()
    assert torch.equal(after.presence, before.presence)
    others = torch.arange(sum(SIZES)) != k
    assert torch.equal(after.present[:, others], before.present[:, others])


def test_no_class_is_background_alone():
    model, given = build((2, 1)), pictures(2)
    for task in model.tasks:
        task.thresholds.fill_(2)
    for mode in MODES:
        found = model.segment(**given, mode=mode)
        assert not found.present.any()
        assert not any(labels.any() for labels in found.labels)


def watch_decoder(model, monkeypatch) -> list:
    """Record what the segmenter is prompted with, and its masks."""
    seen, decode = [], model.segmenter.decode

    def watched(embeddings, prompts, counts):
        masks = decode(embeddings, prompts, counts=counts)
        seen.append((prompts, *masks))
        return masks

    monkeypatch.setattr(model.segmenter, "decode", watched)
    return seen


@pytest.mark.parametrize("sites", ["swin+fusion", "fusion"])
def test_a_later_task_leaves_the_older_classes_as_they_are(sites, monkeypatch):
    model, given = build(SIZES[:4], sites), pictures(1)
    seen = watch_decoder(model, monkeypatch)
    before = model.segment(**given)
    for count in SIZES[4:]:
        add_task(model, count)
    after = model.segment(**given)
    old = sum(SIZES[:4])
    assert model.classes[:old] == tuple(f"class {t}.{k}" for t in range(4) for k in range(SIZES[t]))
    assert torch.equal(after.present[:, :old], before.present)
    assert after.present[:, old:].any()
    assert_close(after.presence[:, :old], before.presence)
    for first, second in zip(*seen, strict=True):
        assert_close(second[: len(first)], first)
    stays = (after.labels[0] <= old).float().mean()
    assert 0.2 < stays < 1
    kept = after.labels[0].where(after.labels[0] <= old, before.labels[0])
    assert agreement([kept], before.labels) >= 0.9999
