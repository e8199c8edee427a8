"""Tests that what DecoupleCSS packs follows the model: tasks added, weights changed, loaded, copied and moved."""

from __future__ import annotations

import copy

import pytest
import torch
from decouplecss_models import add_task, agreement, assert_alike, assert_close, build, phrases, pictures
from torch import nn

from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import MODES


def settled(model, given):
    """Return the second output: the first call measures how many tasks to run side by side, on fewer of them."""
    model.segment(**given)
    return model.segment(**given)


def same_bits(got, expected) -> bool:
    pairs = zip((*got.labels, *got[1:]), (*expected.labels, *expected[1:]), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def change_adapter(model):
    for name, parameter in model.detector.named_parameters():
        if "lora_B.task1" in name:
            parameter.neg_()


def replace_weights(model):
    generator = model.tasks[1].generator
    generator.weight_2 = nn.Parameter(-generator.weight_2)


CHANGES = {
    "adapter": change_adapter,
    "generator": lambda model: model.tasks[1].generator.weight_2.neg_(),
    "new generator weights": replace_weights,
    "class embeddings": lambda model: model.tasks[1].generator.class_embedding.add_(1),
    "thresholds": lambda model: model.tasks[1].thresholds.fill_(2),
    "generator, uncounted": lambda model: model.tasks[1].generator.weight_2.data.neg_(),
    "text encoder, uncounted": lambda model: model.detector.get_base_model().text_projection.weight.data.mul_(-1),
    "threshold": lambda model: setattr(model, "threshold", 0.1),
    "text encoder": lambda model: model.detector.get_base_model().text_projection.weight.mul_(-1),
    "phrases": lambda model: model.tasks[1].input_ids[..., 1].add_(7),
    "detector": lambda model: model.detector.get_base_model().input_proj_vision[0][1].bias.add_(1),
    "segmenter": lambda model: model.segmenter.model.mask_decoder.iou_token.weight.add_(1),
}


@pytest.mark.parametrize("what", CHANGES)
def test_changes_in_eval_mode_are_seen(what):
    model, given = build((2, 3)), pictures(2)
    before = {mode: model.segment(**given, mode=mode) for mode in MODES}
    with torch.no_grad():
        CHANGES[what](model)
    after = {mode: model.segment(**given, mode=mode) for mode in MODES}
    assert not same_bits(after["literal"], before["literal"])
    for mode in MODES:
        assert_alike(after[mode], after["literal"])


def test_nothing_is_packed_again_while_nothing_changes():
    model, given = build((2, 1)), pictures(1)
    model.segment(**given)
    packed = model._all
    for mode in MODES:  # two of them switch the adapters
        model.segment(**given, mode=mode)
    assert model._all is packed


def test_training_in_between_is_seen():
    """Training must be seen even if a change left no trace on the tensor."""
    model, given = build((2, 1)), pictures(1)
    model.segment(**given)
    model.train()
    for task in model.tasks:
        task.generator.weight_2.data.neg_()
    model.eval()
    assert_alike(model.segment(**given), model.segment(**given, mode="literal"))


def test_inference_mode():
    model, given = build((2, 1)), pictures(1)
    with torch.inference_mode():
        first = settled(model, given)
    assert same_bits(model.segment(**given), first)


def test_a_task_added_in_eval_mode():
    model, given = build((2, 1)), pictures(1)
    assert model.segment(**given).present.shape == (1, 3)
    add_task(model, 2)
    assert not any(module.training for module in model.modules())
    after = model.segment(**given)
    assert after.present.shape == (1, 5)
    assert_alike(after, model.segment(**given, mode="literal"))


@torch.no_grad()
def test_an_adapter_does_nothing_as_it_comes():
    model, given = build((2,)), pictures(1)["pixel_values"]
    task = model.add_task(["new"], phrases(1))
    assert task.name == model.detector.active_adapter == "task1"
    embedded = model.detector.get_base_model().embed_phrases(task.input_ids, task.attention_mask)
    for got, expected in zip(
        model.detector(given, phrases=embedded), ClassDetector.random("tiny")(given, phrases=embedded), strict=True
    ):
        assert_close(got, expected)


def test_the_newest_task_is_what_there_is_to_train():
    model, given = build((2, 1)), pictures(1)
    task = model.add_task(["new"], phrases(1))
    embedded = model.detector.get_base_model().embed_phrases(task.input_ids, task.attention_mask)
    found = model.select(model.detector(given["pixel_values"], phrases=embedded))
    prompts = task.generator(found.tokens[0], torch.tensor([0]))
    masks = model.segmenter.decode(model.segmenter.embed(given["sam_pixel_values"]), prompts)
    (masks.masks.square().mean() + found.presence.sum()).backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, parameter in learning.items():
        assert ".task2." in name or name.startswith("tasks.2.generator."), name
        if "lora_A" not in name:  # B is still zero
            assert parameter.grad.any(), name
    assert {name.split(".")[0] for name in learning} == {"detector", "tasks"}
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if name not in learning)


def test_state_round_trip():
    model, given = build((2, 3)), pictures(2)
    expected = settled(model, given)
    state = model.state_dict()
    assert {"tasks.1.thresholds", "tasks.1.generator.weight_1"} <= state.keys()
    assert not any("input_ids" in name or "attention_mask" in name for name in state)
    other = build((2, 3), seed=1)
    with torch.no_grad():
        for tensor in (t for t in other.state_dict().values() if t.is_floating_point()):
            tensor.mul_(0.5)
    assert not same_bits(other.segment(**given), expected)
    other.load_state_dict(state)
    assert same_bits(settled(other, given), expected)


def test_copies_are_models_of_their_own():
    model, given = build((2, 1)), pictures(1)
    expected = settled(model, given)
    copied = copy.deepcopy(model)
    assert same_bits(settled(copied, given), expected)
    with torch.no_grad():
        copied.tasks[0].generator.weight_2.neg_()
    assert not same_bits(copied.segment(**given), expected)
    assert same_bits(model.segment(**given), expected)


@pytest.mark.parametrize("half", ["detector", "segmenter", "both"])
def test_each_frozen_model_may_have_a_dtype_of_its_own(half):
    """Each frozen model may have its own dtype: tasks have SAM's, and pictures come in float32, as they are read."""
    model, given = build((2, 1)), pictures(1)
    if half != "segmenter":
        model.detector.bfloat16()
    if half != "detector":
        model.segmenter.bfloat16(), model.tasks.bfloat16()
    for mode in ("one_pass", "literal"):
        found = model.segment(**given, mode=mode)
        assert found.presence.dtype == (torch.float32 if half == "segmenter" else torch.bfloat16)
        assert found.labels[0].shape == given["sizes"][0]


def test_another_dtype():
    model, given = build((2, 1)), pictures(1)
    expected = settled(model, given)
    given |= {name: given[name].double() for name in ("pixel_values", "sam_pixel_values")}
    model.double()
    got = model.segment(**given)
    assert got.presence.dtype == torch.float64
    assert_close(got.presence, expected.presence.double())
    assert agreement(got.labels, expected.labels) >= 0.9999
    add_task(model, 1)
    assert_alike(model.segment(**given), model.segment(**given, mode="literal"))
