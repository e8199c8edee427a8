"""Tests which modules ``fuse`` leaves as they are, and the reasons it gives."""

from __future__ import annotations

import types

import pytest
import torch
import transformers
from fused_models import assert_equal, random_weights, swin
from torch import nn
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrMultiscaleDeformableAttention
from transformers.models.swin.modeling_swin import SwinLayer

import fastcss
from fastcss._fuse.fusion import fuse_modules


def reason_for(change) -> str:
    """Say why the first layer of a Swin is refused after ``change(layer)``; the model must compute what it did."""
    model, given = swin(), torch.randn(1, 3, 32, 32)
    layer = model.encoder.layers[0].blocks[0]
    change(layer)
    with torch.no_grad():
        expected = model(given)
        fusion = fastcss.fuse(model)
        assert list(fusion.replaced.values()).count("window_attention") == 3
        assert_equal(model(given), expected)
    return fusion.refused["encoder.layers.0.blocks.0"]


def _of_class(module: nn.Module, cls: type) -> None:
    module.__class__ = cls


class OwnSwinLayer(SwinLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states * 2, *args, **kwargs)


def test_refuses_a_subclass():
    reason = reason_for(lambda layer: _of_class(layer, OwnSwinLayer))
    assert reason == "it is a subclass of SwinLayer, and may compute something else"


def test_refuses_a_forward_of_the_instance():
    def kernelized(layer):
        layer.forward = types.MethodType(SwinLayer.forward, layer)

    assert reason_for(kernelized) == "its forward was set on the instance"
    assert "attention was set on the instance" in reason_for(lambda layer: kernelized_attention(layer.attention))


def kernelized_attention(attention: nn.Module) -> None:
    attention.forward = types.MethodType(type(attention).forward, attention)


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_refuses_hooks_that_would_not_run(register):
    reason = reason_for(lambda layer: getattr(layer.attention, register)(lambda *_: None))
    assert reason == "its attention has hooks, which would not run"


@pytest.mark.parametrize("kind", ["swin", "deformable"])
@torch.no_grad()
def test_hooks_since_the_fusion_run(kind):
    """They were no reason to refuse, and must not be passed over in silence."""
    model, given, name = swin(), (torch.randn(1, 3, 32, 32),), "encoder.layers.0.blocks.0.attention"
    if kind == "deformable":
        model, given, name = _deformable()
    expected, calls = model(*given), []
    fuse_modules(model, linears=False)
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(1))
    assert_equal(model(*given), expected)
    assert len(calls) == 1


def _deformable():
    config = transformers.DeformableDetrConfig(d_model=16, encoder_attention_heads=2, num_feature_levels=2)
    layer = DeformableDetrMultiscaleDeformableAttention(config, num_heads=2, n_points=2)
    return Levels(random_weights(layer)), (torch.randn(1, 20, 16), torch.rand(1, 20, 2, 2)), "layer.attn"


class Levels(nn.Module):
    """Calls deformable attention with the sizes of two levels."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, points):
        shapes = [(4, 4), (2, 2)]
        given = {"spatial_shapes": torch.tensor(shapes), "spatial_shapes_list": shapes}
        return self.layer(x, encoder_hidden_states=x, reference_points=points, **given)[0]


def test_refuses_other_parts():
    class OwnAttention(nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.__dict__.update(attention.__dict__)

        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return hidden_states, None

    def replace(layer):
        layer.attention = OwnAttention(layer.attention)

    assert reason_for(replace).endswith("OwnAttention")

    layer = swin().encoder.layers[0].blocks[0]
    del layer.attention.q_proj
    assert "it has no attention.q_proj" in fastcss.fuse(layer).refused[""]


def test_refuses_quantized_weights():
    class Packed(torch.Tensor):
        pass

    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.randn(4, 4).as_subclass(Packed))
    assert fastcss.fuse(layer).refused == {"": "its weight is a Packed"}


class ForkedAttention(nn.Module):
    """Attends as SAM does, in a package that nobody knows."""

    def add_decomposed_rel_pos(self, scores):
        return scores

    def forward(self, x):
        return self.add_decomposed_rel_pos(x)


@pytest.mark.parametrize(
    ("build", "layer", "reason"),
    [
        (lambda: transformers.Swinv2Model(_swin(transformers.Swinv2Config)), "Swinv2Layer", "cosine"),
        (lambda: transformers.Swin2SRModel(_swin(transformers.Swin2SRConfig)), "Swin2SRLayer", "cosine"),
        (
            lambda: transformers.Sam2HieraDetModel(_hiera()),
            "Sam2MultiScaleBlock",
            "not known to compute what window_attention does",
        ),
        (ForkedAttention, "ForkedAttention", "not known to compute what relative_attention does"),
    ],
)
def test_refuses_look_alikes(build, layer, reason):
    model = build()
    fusion = fuse_modules(model, linears=False)
    alike = [name for name, module in model.named_modules() if type(module).__name__ == layer]
    assert list(fusion.refused) == alike != []
    assert all(reason in given for given in fusion.refused.values())
    assert fusion.replaced == {}


def _swin(config):
    return config(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4)


def _hiera():
    return transformers.Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, blocks_per_stage=[1, 1], embed_dim_per_stage=[8, 16],
        num_attention_heads_per_stage=[1, 2], window_size_per_stage=[8, 4], global_attention_blocks=[1],
    )  # fmt: skip
