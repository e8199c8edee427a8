"""Tests which modules ``fuse`` leaves as they are, and the reasons it gives."""

from __future__ import annotations

import types

import pytest
import torch
import transformers
from fused_models import assert_equal, swin
from torch import nn
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


@pytest.mark.parametrize(
    ("build", "layer", "reason"),
    [
        (lambda: transformers.Swinv2Model(_swin(transformers.Swinv2Config)), "Swinv2Layer", "cosine"),
        (lambda: transformers.Swin2SRModel(_swin(transformers.Swin2SRConfig)), "Swin2SRLayer", "cosine"),
        (
            lambda: transformers.VitDetModel(_vit_det()),
            "VitDetLayer",
            "not known to compute what window_attention does",
        ),
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


def _vit_det():
    return transformers.VitDetConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=32, pretrain_image_size=32
    )
