"""SAM's image encoder and its relatives, fused, against themselves."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from fused_models import assert_equal, assert_same_bits
from sam_models import MODELS, SIDE, build, build_layer
from torch import Tensor, nn

import fastcss
from fastcss._fuse.fusion import fuse_modules

# Of the models of one form, all but one differ in names only.
EACH_KIND = pytest.mark.parametrize("kind", ["sam", "vitdet", "seggpt"])
EACH_LAYER = pytest.mark.parametrize(
    ("kind", "index"), [("sam", 0), ("sam", 1), ("vitdet", 0), ("vitdet", 1), ("seggpt", 1)]
)


def given_to(kind: str, batch: int = 2) -> tuple[Tensor, ...]:
    generator, side = torch.Generator().manual_seed(0), 8 * SIDE
    if kind == "seggpt":  # a picture and its prompt, one above the other, and the prompt's mask
        return tuple(torch.randn(3, batch, 3, side // 2, side, generator=generator))
    return (torch.randn(batch, 3, side, side, generator=generator),)


def tokens(kind: str, height: int, width: int) -> Tensor:
    x = torch.randn(2, height, width, 16, generator=torch.Generator().manual_seed(0))
    return x.permute(0, 3, 1, 2).contiguous() if kind == "vitdet" else x


def first(output: Tensor | tuple) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_equals_the_model(kind, device):
    """transformers puts hooks on all attention modules as soon as hidden states are asked for; they must not matter."""
    model = build(kind).to(device)
    given = tuple(x.to(device) for x in given_to(kind))
    expected = model(*given, output_hidden_states=True)
    names = list(model.state_dict())
    fusion = fastcss.fuse(model)
    assert list(fusion.replaced.values()).count("relative_attention") == 3
    assert fusion.refused == {}
    assert list(model.state_dict()) == names
    assert_equal(model(*given, output_hidden_states=True), expected)
    fusion.undo()
    assert_same_bits(model(*given, output_hidden_states=True), expected)


@torch.no_grad()
def test_eager_attention():
    model, given = build("sam", attn_implementation="eager"), given_to("sam")
    expected = model(*given)
    assert type(model.vision_encoder.layers[0].attn).__name__ == "SamVisionAttention"
    fastcss.fuse(model)
    assert_equal(model(*given), expected)


@EACH_LAYER
@pytest.mark.parametrize("size", [(10, 10), (8, 12), (9, 8), (3, 5), (1, 1)], ids=lambda size: f"{size[0]}x{size[1]}")
@torch.no_grad()
def test_layers(kind, index, size):
    """The tables of a layer without windows are for 10x10; the windows are of 4x4."""
    layer, x = build_layer(kind, index), tokens(kind, *size)
    expected = first(layer(x))
    assert fastcss.fuse(layer).replaced[""] == "relative_attention"
    assert_equal(first(layer(x)), expected)


@EACH_KIND
@torch.no_grad()
def test_the_tables_matter(kind):
    """The other tests would see nothing of the relative positions otherwise."""
    layer, x = build_layer(kind, 1), tokens(kind, 10, 10)
    fastcss.fuse(layer)
    expected = first(layer(x))
    for name in ("rel_pos_h", "rel_pos_w"):
        other = copy.deepcopy(layer)
        next(p for of, p in other.named_parameters() if of.endswith(name)).zero_()
        assert (first(other(x)) - expected).norm() > 1e-2 * expected.norm()


@EACH_LAYER
def test_gradients(kind, index):
    layer, x = build_layer(kind, index), tokens(kind, 7, 9).requires_grad_()
    wanted = [x, *layer.parameters()]

    def gradients() -> tuple[Tensor, ...]:
        output = first(layer(x))
        return torch.autograd.grad((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum(), wanted)

    expected = gradients()
    fastcss.fuse(layer)
    got = gradients()
    scale = max(e.norm() for e in expected)
    for g, e in zip(got, expected, strict=True):
        # The biases of keys have a gradient of zero, apart from rounding.
        assert (g - e).norm() <= 1e-5 * e.norm() + 1e-6 * scale


def test_training_with_dropout_falls_back():
    layer, x = build_layer("sam", 0, attention_dropout=0.5, attn_implementation="eager").train(), tokens("sam", 9, 6)
    fused = copy.deepcopy(layer)
    fuse_modules(fused, linears=False)
    outputs = []
    for each in (layer, fused):
        torch.manual_seed(0)
        outputs.append(each(x))
    assert_same_bits(*outputs)
    assert_equal(fused.eval()(x), layer.eval()(x))
    assert not torch.equal(fused(x), outputs[0])


@pytest.mark.parametrize("kind", ["vitdet", "seggpt"])
@torch.no_grad()
def test_training_with_stochastic_depth(kind):
    """Whole layers must be dropped by the same random numbers as in the model."""
    model, given = build(kind, drop_path_rate=0.5).train(), given_to(kind)
    fused = copy.deepcopy(model)
    fastcss.fuse(fused)
    outputs = []
    for each in (model, fused):
        torch.manual_seed(0)
        outputs.append(each(*given).last_hidden_state)
    assert_equal(*outputs)
    assert not torch.equal(model.eval()(*given).last_hidden_state, outputs[0])


@torch.no_grad()
def test_gradient_checkpointing():
    model, given = build("sam").train(), given_to("sam")
    model.gradient_checkpointing_enable()
    fastcss.fuse(model)

    def gradients() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(model(*given).last_hidden_state.square().sum(), list(model.parameters())[2:9])

    checkpointed = gradients()
    model.gradient_checkpointing_disable()
    assert_equal(checkpointed, gradients())


@pytest.mark.parametrize("autocast", [False, True])
@torch.no_grad()
def test_bfloat16(autocast, tolerances):
    """The fused model must be no further from the float64 model than the model's own bfloat16 is."""
    model, (x,) = build("sam"), given_to("sam")
    exact = copy.deepcopy(model).double()(x.double()).last_hidden_state
    if not autocast:
        model, x = model.bfloat16(), x.bfloat16()

    def error() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(x).last_hidden_state
        assert autocast or output.dtype == torch.bfloat16
        return (output - exact).norm() / exact.norm()

    allowed = error()
    fastcss.fuse(model)
    assert error() <= 1.1 * allowed + tolerances[torch.bfloat16]


# ---------------------------------------------------------------------------------------- weights, hooks, and refusals


@torch.no_grad()
def test_sam_cannot_return_its_weights():
    model, given = build("sam", attn_implementation="eager"), given_to("sam")
    fusion = fuse_modules(model, linears=False)
    with pytest.raises(ValueError, match=r"SamVision\w+ is asked for output_attentions.*undo\(\) the fusion first"):
        model(*given, output_attentions=True)
    fusion.undo()
    assert [weights.shape[1:] for weights in model(*given, output_attentions=True).attentions][1] == (100, 100)


@pytest.mark.parametrize("kind", ["vitdet", "seggpt"])
@torch.no_grad()
def test_gives_its_weights_when_asked(kind):
    model, given = build(kind), given_to(kind)
    expected = model(*given, output_attentions=True)
    assert len(expected.attentions) == 3
    fuse_modules(model, linears=False)
    assert_same_bits(model(*given, output_attentions=True), expected)


@pytest.mark.parametrize("kind", ["sam", "vitdet"])
@torch.no_grad()
def test_a_hook_on_attention_is_called(kind):
    """Before the fusion it is a reason to refuse; a later one sees the windows that the model cuts."""
    layer, x, seen = build_layer(kind, 0), tokens(kind, 9, 6), []
    name = "attn" if kind == "sam" else "attention"
    attention, expected = layer.get_submodule(name), first(layer(x))
    fusion = fuse_modules(layer, linears=False)
    handle = attention.register_forward_hook(lambda *call: seen.append(call[1][0].shape if call[1] else ()))
    assert_equal(first(layer(x)), expected)
    assert len(seen) == 1
    fusion.undo()
    assert fuse_modules(layer, linears=False).refused == {"": f"its {name} has hooks, which would not run"}
    handle.remove()
    assert fuse_modules(layer, linears=False).refused == {}


@pytest.mark.parametrize(("kind", "option"), [("sam", "use_rel_pos"), ("vitdet", "use_relative_position_embeddings")])
@torch.no_grad()
def test_refuses_attention_without_relative_positions(kind, option):
    model = build(kind, **{option: False})
    fusion = fuse_modules(model, linears=False)
    assert fusion.replaced == {}
    assert list(fusion.refused.values()) == ["its attention has no relative positions"] * 3


def test_refuses_attention_of_others():
    """A module that stands in for the attention must run."""

    class Own(nn.Module):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
            return hidden_states, None

    layer = build_layer("sam", 0)
    for name in ("qkv", "proj", "scale", "num_attention_heads", "use_rel_pos", "dropout"):
        setattr(Own, name, getattr(layer.attn, name))
    layer.attn = Own()
    assert fuse_modules(layer, linears=False).refused[""].startswith("its attn is a test_fused_sam.")


# ------------------------------------------------------------------------------------------ copies, compilers, adapters


@torch.no_grad()
def test_copies_and_pickles():
    model, given = build("sam"), given_to("sam")
    fastcss.fuse(model)
    expected, file = model(*given), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
        assert_same_bits(other(*given), expected)


@pytest.mark.parametrize("kind", ["sam", "vitdet"])
@torch.no_grad()
def test_compiles_without_graph_breaks(kind):
    layer, x = build_layer(kind, 0), tokens(kind, 9, 6)
    fastcss.fuse(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_equal(first(compiled(x)), first(layer(x)))


@torch.no_grad()
def test_exports():
    layer, x = build_layer("sam", 0), tokens("sam", 9, 6)
    fastcss.fuse(layer)
    assert_equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_has_torch_calls_only():
    layer, x = build_layer("sam", 0), tokens("sam", 9, 6)
    expected = layer(x)
    fastcss.fuse(layer)
    traced = torch.jit.trace(layer, x)
    assert "fastcss::" not in str(traced.inlined_graph)
    assert_equal(traced(x), expected)
