"""Swin v1 and its copies, fused, against themselves."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from fused_models import assert_equal, assert_same_bits, random_weights
from transformers.models.clap.modeling_clap import ClapAudioLayer
from transformers.models.donut.modeling_donut_swin import DonutSwinLayer
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinLayer, MaskFormerSwinModel
from transformers.models.swin.modeling_swin import SwinLayer

import fastcss
from fastcss._fuse.fusion import fuse_modules

SIZES = {"patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
MODELS = {
    "swin": (transformers.SwinModel, transformers.SwinConfig),
    "donut": (transformers.DonutSwinModel, transformers.DonutSwinConfig),
    "maskformer": (MaskFormerSwinModel, transformers.MaskFormerSwinConfig),
}
LAYERS = {
    "swin": (SwinLayer, transformers.SwinConfig),
    "donut": (DonutSwinLayer, transformers.DonutSwinConfig),
    "clap": (ClapAudioLayer, transformers.ClapAudioConfig),
    "maskformer": (MaskFormerSwinLayer, transformers.MaskFormerSwinConfig),
}
EACH_MODEL = pytest.mark.parametrize("kind", MODELS)
EACH_LAYER = pytest.mark.parametrize("kind", LAYERS)


def build(kind: str, **options):
    model, config = MODELS[kind]
    return random_weights(model(config(**(SIZES | {"image_size": 32} | options))))


def build_layer(kind: str, shift: int = 2, **options):
    layer, config = LAYERS[kind]
    config = config(window_size=4, hidden_dropout_prob=0.0, **options)
    config._attn_implementation = "sdpa"
    return random_weights(layer(config, dim=16, input_resolution=(9, 9), num_heads=2, shift_size=shift))


def image(height: int, width: int, batch: int = 2) -> dict:
    pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "interpolate_pos_encoding": True}


def tokens(height: int, width: int) -> tuple[torch.Tensor, tuple[int, int]]:
    return torch.randn(2, height * width, 16, generator=torch.Generator().manual_seed(0)), (height, width)


@EACH_MODEL
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(32, 32), (46, 38), (32, 70)], ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_equals_the_model(kind, size, batch, device):
    """The sizes need no padding, padding of both dimensions, or of one; every other layer is shifted."""
    model, given = build(kind, image_size=size).to(device), image(*size, batch)
    given["pixel_values"] = given["pixel_values"].to(device)
    expected = model(**given, output_hidden_states=True)
    fusion = fastcss.fuse(model)
    assert list(fusion.replaced.values()).count("window_attention") == 4
    assert fusion.refused == {}
    assert_equal(model(**given, output_hidden_states=True), expected)
    fusion.undo()
    assert_same_bits(model(**given, output_hidden_states=True), expected)


@EACH_MODEL
@torch.no_grad()
def test_windows_larger_than_the_map(kind):
    """Swin shrinks its window to the map for good, and then its table of biases does not fit any more: its own error
    must come, in this call and in later ones. MaskFormer's copy pads the map instead."""
    model = build(kind)
    fused = copy.deepcopy(model)
    fastcss.fuse(fused)
    for given in (image(10, 12), image(32, 32)):
        if kind == "maskformer":
            assert_equal(fused(**given), model(**given))
        else:
            assert error_of(fused, given) == error_of(model, given)


def error_of(model, given: dict) -> str:
    with pytest.raises(RuntimeError) as error:
        model(**given)
    return str(error.value)


@EACH_LAYER
@pytest.mark.parametrize("size", [(9, 6), (4, 4), (4, 11), (8, 12)], ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_layers(kind, size):
    layer, given = build_layer(kind), tokens(*size)
    fused = copy.deepcopy(layer)
    assert fastcss.fuse(fused).replaced[""] == "window_attention"
    assert_equal(fused(*given)[0], layer(*given)[0])
    assert (fused.window_size, fused.shift_size) == (layer.window_size, layer.shift_size)
    assert fused.shift_size == (0 if kind != "maskformer" and min(size) <= 4 else 2)


@pytest.mark.parametrize("kind", ["swin", "donut", "clap"])
@torch.no_grad()
def test_always_partition(kind):
    """A map no larger than the window must be padded and shifted all the same."""
    layer, given = build_layer(kind), tokens(3, 5)
    expected = layer(*given, always_partition=True)[0]
    fastcss.fuse(layer)
    assert_equal(layer(*given, always_partition=True)[0], expected)
    assert (layer.window_size, layer.shift_size) == (4, 2)


@EACH_LAYER
@torch.no_grad()
def test_gives_its_weights_when_asked(kind):
    layer, given = build_layer(kind), tokens(9, 6)
    if kind == "swin":
        layer.attention.config._attn_implementation = "eager"
    expected = layer(*given, output_attentions=True)
    assert expected[1].shape[1:] == (2, 16, 16)
    fuse_modules(layer, linears=False)
    assert_same_bits(layer(*given, output_attentions=True), expected)


@EACH_LAYER
def test_training_with_dropout_falls_back(kind):
    layer, given = build_layer(kind, attention_probs_dropout_prob=0.5).train(), tokens(9, 6)
    fused = copy.deepcopy(layer)
    fuse_modules(fused, linears=False)
    outputs = []
    for each in (layer, fused):
        torch.manual_seed(0)
        outputs.append(each(*given)[0])
    assert_same_bits(*outputs)
    assert_equal(fused.eval()(*given)[0], layer.eval()(*given)[0])
    assert not torch.equal(fused(*given)[0], outputs[0])


@EACH_MODEL
@torch.no_grad()
def test_training_with_stochastic_depth(kind):
    """Whole layers must be dropped by the same random numbers as in the model."""
    model, given = build(kind, drop_path_rate=0.5, hidden_dropout_prob=0.0).train(), image(46, 38)
    fused = copy.deepcopy(model)
    fastcss.fuse(fused)
    outputs = []
    for each in (model, fused):
        torch.manual_seed(0)
        outputs.append(each(**given).last_hidden_state)
    assert_equal(*outputs)
    assert not torch.equal(model.eval()(**given).last_hidden_state, outputs[0])


@EACH_LAYER
def test_gradients(kind):
    layer, (x, size) = build_layer(kind), tokens(9, 6)
    wanted = [x.requires_grad_(), *layer.parameters()]

    def gradients():
        output = layer(x, size)[0]
        return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), wanted)

    expected = gradients()
    fuse_modules(layer, linears=False)
    got = gradients()
    scale = max(e.norm() for e in expected)
    for g, e in zip(got, expected, strict=True):
        # The biases of keys have a gradient of zero, apart from rounding.
        assert (g - e).norm() <= 1e-5 * e.norm() + 1e-6 * scale


@torch.no_grad()
def test_gradient_checkpointing():
    model, given = build("swin", drop_path_rate=0.0, hidden_dropout_prob=0.0).train(), image(46, 38)
    model.gradient_checkpointing_enable()
    fastcss.fuse(model)

    def gradients():
        with torch.enable_grad():
            return torch.autograd.grad(model(**given).last_hidden_state.square().sum(), list(model.parameters())[2:9])

    checkpointed = gradients()
    model.gradient_checkpointing_disable()
    assert_equal(checkpointed, gradients())


@torch.no_grad()
def test_bfloat16(tolerances):
    """The fused model must be no further from the float64 model than the model's own bfloat16 is."""
    model, given = build("swin"), image(46, 38)
    exact = model.double()(**{**given, "pixel_values": given["pixel_values"].double()}).last_hidden_state
    given["pixel_values"] = given["pixel_values"].bfloat16()
    own = model.bfloat16()(**given).last_hidden_state
    fastcss.fuse(model)
    got = model(**given).last_hidden_state
    assert got.dtype == torch.bfloat16
    error, allowed = ((output - exact).norm() / exact.norm() for output in (got, own))
    assert error <= 1.1 * allowed + tolerances[torch.bfloat16]


@torch.no_grad()
def test_compiles_without_graph_breaks():
    layer, (x, size) = build_layer("swin"), tokens(9, 6)
    fastcss.fuse(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_equal(compiled(x, size)[0], layer(x, size)[0])


@torch.no_grad()
def test_attention_of_another_kind_falls_back():
    """The layer must run a user's own attention function, which transformers calls by its name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer, given, calls = build_layer("swin"), tokens(9, 6), []

    def attention(module, query, *args, **kwargs):
        calls.append(module)
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("own_attention", attention)
    layer.attention.config._attn_implementation = "own_attention"
    fastcss.fuse(layer)
    layer(*given)
    assert len(calls) == 1
