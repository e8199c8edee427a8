"""Grounding DINO's encoder, fused, against itself as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from fused_models import assert_equal, assert_same_bits, encoder, encoder_inputs
from torch import nn

import fastcss
from fastcss._fuse.fusion import Fusion, fuse_modules
from fastcss.models.grounding_dino import LORA_SITES, add_adapters

SITES = LORA_SITES | {
    "every projection": r".*\.([qkvo]_proj|(values_|out_)?(vision|text)_proj|(value|output)_proj|sampling_offsets"
    r"|attention_weights)"
}
OPS = {"window_attention": 4, "deformable_attention": 2, "bi_attention": 2, "linear": 70}


def counts(fusion: Fusion) -> dict[str, int]:
    ops = list(fusion.replaced.values())
    return {op: ops.count(op) for op in set(ops)}


@pytest.mark.parametrize("linears", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_equals_the_model(batch, linears, device):
    model, given = encoder(device), encoder_inputs(batch, device)
    expected = model(**given)
    fusion = fuse_modules(model, linears)
    assert counts(fusion) == {op: n for op, n in OPS.items() if linears or op != "linear"}
    assert fusion.refused == {}
    assert_equal(model(**given), expected)
    fusion.undo()
    assert_same_bits(model(**given), expected)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("order", ["adapters first", "fused first"])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_with_adapters(batch, order, sites, monkeypatch):
    """PEFT's layers must stay inside the fused modules, and set_adapter must go on working."""
    monkeypatch.setitem(LORA_SITES, sites, SITES[sites])
    model, given = encoder(), encoder_inputs(batch)
    adapted = add_adapters(copy.deepcopy(model), 2, rank=4, sites=sites)
    expected = []
    for task in ("task0", "task1"):
        adapted.set_adapter(task)
        expected.append(adapted(**given))
    assert not torch.equal(*(output.last_hidden_state_vision for output in expected))
    if order == "fused first":
        fastcss.fuse(model)
        adapted = add_adapters(model, 2, rank=4, sites=sites)
    else:
        fastcss.fuse(adapted)
    for task, wanted in zip(("task0", "task1"), expected, strict=True):
        adapted.set_adapter(task)
        assert_equal(adapted(**given), wanted)


@torch.no_grad()
def test_merged_adapters():
    model, given = add_adapters(encoder(), 1, rank=4, sites="swin+fusion"), encoder_inputs(2)
    expected = model(**given)
    fastcss.fuse(model)
    model.merge_adapter()
    assert_equal(model(**given), expected)
    model.unmerge_adapter()
    assert_equal(model.unload()(**given), encoder()(**given))


@pytest.mark.parametrize("with_adapters", [False, True])
def test_gradients(with_adapters, device):
    model, given = encoder(device), encoder_inputs(2, device)
    if with_adapters:
        model = add_adapters(model, 1, rank=4, sites="swin+fusion")
    given["pixel_values"].requires_grad_()

    def gradients() -> list[torch.Tensor]:
        wanted = [given["pixel_values"], *(p for p in model.parameters() if p.requires_grad)]
        output = model(**given)
        # All elements have different weights, as the plain sum of a normalised output is a constant.
        loss = sum((o * torch.linspace(-1, 1, o.numel(), device=device).view_as(o)).sum() for o in output.values())
        return [
            g if g is not None else torch.zeros(1, device=device)
            for g in torch.autograd.grad(loss, wanted, allow_unused=True)
        ]

    expected = gradients()
    fastcss.fuse(model)
    got = gradients()
    scale = max(e.norm() for e in expected)
    for g, e in zip(got, expected, strict=True):
        # A gradient that is zero apart from rounding must be so in both.
        assert (g - e).norm() <= 1e-4 * e.norm() + 1e-6 * scale


@torch.no_grad()
def test_keeps_names_state_and_copies():
    model, given = encoder(), encoder_inputs(1)
    expected, state = model(**given), model.state_dict()
    names, before = [name for name, _ in model.named_modules()], [type(module) for module in model.modules()]
    fusion = fastcss.fuse(model)
    assert [name for name, _ in model.named_modules()] == names
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), before, strict=True))
    assert list(model.state_dict()) == list(state)
    assert all(model.state_dict()[name].data_ptr() == state[name].data_ptr() for name in state)
    copied = copy.deepcopy(model)
    assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
    fused = model(**given)
    fusion.undo()
    assert [type(module) for module in model.modules()] == before
    assert_same_bits(copied(**given), fused)
    assert_same_bits(model(**given), expected)
    model.load_state_dict(copied.state_dict())


def test_hooks_stay():
    model, seen = encoder(), []
    for name, module in model.named_modules():
        if type(module).__name__ in ("SwinLayer", "GroundingDinoBiMultiHeadAttention") or type(module) is nn.Linear:
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        model(**encoder_inputs(1))
        before, seen = set(seen), []
        fastcss.fuse(model)
        model(**encoder_inputs(1))
    assert set(seen) == before
