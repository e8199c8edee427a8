"""Tests what ``fuse`` reports, refuses and undoes, on any model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import peft
import pytest
import torch
import transformers
from fused_models import EXACT, assert_equal, assert_same_bits, encoder, encoder_inputs, swin
from torch import nn
from torch.autograd import forward_ad
from transformers.models.swin.modeling_swin import SwinLayer

import fastcss
from fastcss._fuse import linear
from fastcss._fuse.fusion import fuse_modules


def perceptron() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


@pytest.mark.parametrize("model", [None, "swin", SwinLayer, [nn.Linear(2, 2)]])
def test_only_modules(model):
    with pytest.raises(TypeError, match=r"fuse: model must be a torch\.nn\.Module, got \w+"):
        fastcss.fuse(model)


def test_nothing_to_replace():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    fusion = fastcss.fuse(model)
    assert (fusion.replaced, fusion.refused) == ({}, {})
    assert str(fusion) == "Fusion of Sequential: 0 modules replaced, 0 refused"
    fusion.undo()


def test_lists_what_it_did():
    model = nn.Sequential(swin(depths=[1, 1]), nn.MultiheadAttention(8, 2), nn.Linear(2, 2))
    fusion = fastcss.fuse(model)
    assert fusion.replaced["0.encoder.layers.0.blocks.0"] == "window_attention"
    assert fusion.replaced["0.encoder.layers.0.blocks.0.attention.q_proj"] == fusion.replaced["2"] == "linear"
    assert list(fusion.refused) == ["1.out_proj"]
    assert str(fusion).splitlines() == [
        "Fusion of Sequential: 16 modules replaced, 1 refused",
        "  2 × SwinLayer on window_attention",
        "  14 × Linear on linear",
        "  1 × NonDynamicallyQuantizableLinear not: it is a subclass of Linear, and may compute something else",
    ]
    assert repr(fuse_modules(model, linears=False)).splitlines()[1:] == [
        "  2 × FusedSwinLayer not: it is fused already"
    ]


def test_fused_and_undone_twice():
    model = perceptron()
    first, second = fastcss.fuse(model), fastcss.fuse(model)
    assert (list(first.replaced), second.replaced) == (["0", "2"], {})
    assert second.refused == dict.fromkeys(["0", "2"], "it is fused already")
    second.undo()
    assert type(model[0]).__name__ == "FusedLinear"
    first.undo()
    first.undo()
    assert type(model[0]) is type(model[2]) is nn.Linear
    assert list(fastcss.fuse(model).replaced) == ["0", "2"]


def test_undo_wants_the_classes_it_gave():
    model = perceptron()
    fusion = fastcss.fuse(model)
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(RuntimeError, match="'2' has become a ParametrizedFusedLinear since"):
        fusion.undo()
    assert type(model[0]).__name__ == "FusedLinear"
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    fusion.undo()
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_one_class_for_all():
    a, b = perceptron(), perceptron()
    fastcss.fuse(a)
    fastcss.fuse(b)
    assert type(a[0]) is type(b[2])


@torch.no_grad()
def test_copies_and_pickles():
    model, given = swin(), torch.randn(1, 3, 32, 32)
    fastcss.fuse(model)
    expected = model(given)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copy.copy(model), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert_same_bits(other(given), expected)


# ------------------------------------------------------------------------------------------------- attention weights


@pytest.mark.parametrize("way", ["argument", "position", "config"])
@torch.no_grad()
def test_models_cannot_return_weights(way):
    model = transformers.Mask2FormerModel(_mask2former()).eval()
    given = {"pixel_values": torch.randn(1, 3, 64, 64)}
    fusion = fastcss.fuse(model)
    model(**given)
    args = ()
    if way == "argument":
        given["output_attentions"] = True
    elif way == "position":
        args, given = (given["pixel_values"], None, None, True), {}
    else:
        model.config.output_attentions = True
    with pytest.raises(ValueError, match=r"Mask2FormerModel is asked for output_attentions.*undo\(\) the fusion first"):
        model(*args, **given)
    with pytest.raises(ValueError, match="output_attentions"):
        copy.deepcopy(model)(*args, **given)
    fusion.undo()
    assert model(*args, **given).attentions[0] is not None
    assert not any(module._forward_pre_hooks for module in model.modules())


def _mask2former():
    swin = transformers.SwinConfig(
        image_size=64, patch_size=2, embed_dim=8, depths=[1] * 4, num_heads=[1, 2, 2, 2], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    return transformers.Mask2FormerConfig(
        backbone_config=swin, hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_layers=1, decoder_layers=2,
        num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16, num_queries=4,
    )  # fmt: skip


@torch.no_grad()
def test_a_model_inside_cannot_return_weights_either():
    model, given = encoder(), encoder_inputs(1)
    fastcss.fuse(model)
    model.encoder.config.output_attentions = True
    with pytest.raises(ValueError, match="GroundingDinoEncoder is asked for output_attentions"):
        model(**given)


@torch.no_grad()
def test_some_layers_give_their_weights():
    config = transformers.DonutSwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    model, given = transformers.DonutSwinModel(config).eval(), torch.randn(1, 3, 32, 32)
    expected = model(given, output_attentions=True)
    fastcss.fuse(model)
    assert_equal(model(given, output_attentions=True), expected)
    assert len(expected.attentions) == 2


@torch.no_grad()
def test_linear_layers_alone_leave_weights_alone():
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=16, patch_size=4,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    fastcss.fuse(model)
    assert model(torch.randn(1, 3, 16, 16), output_attentions=True).attentions[0].shape == (1, 2, 17, 17)


# ------------------------------------------------------------------------------------------------------- linear layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (50, 7), (2, 40, 7)])
def test_linear(shape, bias, monkeypatch):
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    layer, x = nn.Linear(7, 5, bias=bias), torch.randn(shape, requires_grad=True)
    wanted = [x, *layer.parameters()]
    expected = layer(x), torch.autograd.grad(layer(x).square().sum(), wanted)
    fastcss.fuse(layer)
    assert_equal((layer(x), torch.autograd.grad(layer(x).square().sum(), wanted)), expected, EXACT)


def test_base_layers_of_peft(monkeypatch):
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    model = peft.get_peft_model(perceptron(), peft.LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(50, 8)
    expected = model(x)
    fusion = fastcss.fuse(model)
    assert fusion.replaced["base_model.model.0.base_layer"] == "linear"
    assert_equal(model(x), expected)


def test_linear_in_torchscript(monkeypatch):
    """A trace and a script of fused layers must be those of unfused ones, and eager calls go on as before."""
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    model, x = perceptron().eval(), torch.randn(50, 8)
    expected = model(x)
    fastcss.fuse(model)
    traced = torch.jit.trace(model, x)
    assert "aten::linear" in str(traced.inlined_graph)
    for form in (traced, torch.jit.script(model), model):
        assert_equal(form(x), expected)


def test_quantization_after_fusion_is_refused(monkeypatch):
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    model = perceptron().eval()
    fusion = fastcss.fuse(model)
    for quantize in (torch.ao.quantization.quantize_dynamic, _prepare):
        with pytest.raises(RuntimeError, match=r"fuse: .*FusedLinear: undo the fusion before"):
            quantize(model)
    fusion.undo()
    quantized = torch.ao.quantization.quantize_dynamic(model)
    assert type(quantized[0]).__module__ == "torch.ao.nn.quantized.dynamic.modules.linear"
    assert "about to quantize" in fastcss.fuse(_prepare(model)).refused["0"]


def _prepare(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    model.qconfig = torch.ao.quantization.default_qconfig
    return torch.ao.quantization.prepare(model)


@pytest.mark.parametrize("transform", ["jvp", "dual level", "jacfwd", "hessian"])
def test_forward_mode_of_linear(transform, monkeypatch):
    monkeypatch.setattr(linear, "OWN_GEMM_LEADS", True)
    model, x = perceptron(), torch.randn(20, 8)

    def tangent() -> torch.Tensor:
        if transform == "jvp":
            return torch.func.jvp(model, (x,), (x,))[1]
        if transform == "dual level":
            with forward_ad.dual_level():
                return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent
        return getattr(torch.func, transform)(lambda x: model(x).square().sum())(x)

    expected = tangent()
    fastcss.fuse(model)
    assert_equal(tangent(), expected)


def test_import_leaves_transformers_alone():
    code = "import sys, fastcss; assert not {'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
