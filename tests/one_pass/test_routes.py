"""Tests one adapter per sample: which inputs are cut into samples, and how the outputs are put together again."""

from __future__ import annotations

import pytest
import torch
import transformers
from adapted_models import EXACT, adapt
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fastcss

ROUTE = torch.tensor([1, -1, 0])


def one_by_one(model, given: dict, per_sample, route=ROUTE) -> list:
    """Return PEFT's output for each sample in a batch of one."""
    outputs = []
    for i, task in enumerate(route.tolist()):
        sample = {key: _entry(value, i, len(route)) if key in per_sample else value for key, value in given.items()}
        if task < 0:
            with model.disable_adapter():
                outputs.append(model(**sample))
        else:
            model.set_adapter(f"task{task}")
            outputs.append(model(**sample))
    return outputs


def _entry(value, i, size):
    rows = len(value) // size
    return value[i * rows : (i + 1) * rows]


def assert_put_together(got, whole, outputs: list) -> None:
    """Check that ``got`` has the structure and shapes of ``whole``, the batch's output, and the values of
    ``outputs``."""
    leaves, structure = pytree.tree_flatten(got)
    shaped, expected = pytree.tree_flatten(whole)
    assert structure == expected
    alone = [pytree.tree_leaves(output) for output in outputs]
    for leaf, like, *values in zip(leaves, shaped, *alone, strict=True):
        if not isinstance(leaf, Tensor):
            continue
        if not like.dim():  # a loss: one a sample
            wanted = torch.stack(values)
        else:
            axes = [d for d in range(like.dim()) if like.shape[d] != values[0].shape[d]]
            wanted = torch.cat(values, axes[0]) if axes else values[0]
            assert leaf.shape == like.shape
        torch.testing.assert_close(leaf, wanted, atol=10 * EXACT, rtol=0)


def resnet(**options) -> transformers.ResNetConfig:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic", **options
    )


def detr():
    config = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, num_labels=4, dropout=0.0, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, backbone_config=resnet(out_features=["stage4"]),
    )  # fmt: skip
    return transformers.DetrForObjectDetection(config)


def maskformer():
    swin = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2, drop_path_rate=0.0,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    decoder = transformers.DetrConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5, use_timm_backbone=False,
        backbone_config=resnet(),
    )  # fmt: skip
    return transformers.MaskFormerForInstanceSegmentation(
        transformers.MaskFormerConfig(
            fpn_feature_size=32, mask_feature_size=32, backbone_config=swin, decoder_config=decoder, num_labels=4
        )
    )


def eomt():
    config = transformers.EomtConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=16, num_blocks=1,
        num_queries=5, num_labels=4, train_num_points=64, num_upscale_blocks=1, mlp_ratio=2, layerscale_value=1.0,
    )  # fmt: skip
    return transformers.EomtForUniversalSegmentation(config)


def segformer():
    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=4,
    )  # fmt: skip
    return transformers.SegformerForSemanticSegmentation(config)


def lw_detr():
    backbone = transformers.LwDetrViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, num_windows=4,
        window_block_indices=[0], out_features=["stage2"],
    )  # fmt: skip
    config = transformers.LwDetrConfig(
        backbone_config=backbone, d_model=16, decoder_ffn_dim=16, decoder_layers=2, decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2, decoder_n_points=2, num_queries=5, group_detr=1, num_labels=4, dropout=0.0,
        projector_scale_factors=[1.0],
    )  # fmt: skip
    return transformers.LwDetrForObjectDetection(config)


def owlv2():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 100, "max_position_embeddings": 8, "bos_token_id": 98, "eos_token_id": 99}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    return transformers.Owlv2ForObjectDetection(
        transformers.Owlv2Config(text_config={**text, "pad_token_id": 0}, vision_config=vision, projection_dim=16)
    )


def boxes(*counts: int) -> list[dict]:
    return [{"class_labels": torch.randint(4, (n,)), "boxes": 0.3 + 0.4 * torch.rand(n, 4)} for n in counts]


def masks(*counts: int) -> dict:
    return {
        "mask_labels": [(torch.rand(n, 64, 64) > 0.5).float() for n in counts],
        "class_labels": [torch.randint(4, (n,)) for n in counts],
    }


def pixels() -> Tensor:
    return torch.randint(4, (3, 64, 64))


def built(build, *sites: str):
    torch.manual_seed(0)
    return adapt(build(), *({"r": 2, "target_modules": list(sites)} for _ in range(2)))


def images(batch: int = 3, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def text(rows: int) -> dict:
    return {"pixel_values": images(), "input_ids": torch.randint(1, 90, (rows, 5))}


def detection(*counts: int) -> dict:
    return {"pixel_values": images(size=64), "labels": boxes(*counts)}


MODELS = {
    "labels in lists": (maskformer, ("query", "fc1"), lambda: {"pixel_values": images(size=64), **masks(1, 2, 4)}),
    "labels in dicts": (detr, ("q_proj", "fc1"), lambda: detection(1, 2, 4)),
    "labels in lists, points drawn": (eomt, ("q_proj",), lambda: {"pixel_values": images(size=64), **masks(1, 2, 4)}),
    "a label for every pixel": (segformer, ("q_proj",), lambda: {"pixel_values": images(size=64), "labels": pixels()}),
    "as many labels as samples": (detr, ("q_proj",), lambda: detection(3, 3, 3)),
    "batch in axis 1": (lw_detr, ("query", "q_proj", "fc1"), lambda: {"pixel_values": images()}),
    "text of samples": (owlv2, ("q_proj",), lambda: text(3)),
    "two texts a sample": (owlv2, ("q_proj",), lambda: text(6)),
}


@pytest.mark.filterwarnings("ignore:.*does not run under vmap")
@pytest.mark.parametrize("engine", ["auto", "replay"])
@pytest.mark.parametrize("what", MODELS)
@torch.no_grad()
def test_each_sample_has_its_own_inputs_and_outputs(what, engine):
    build, sites, given = MODELS[what]
    model, given = built(build, *sites), given()
    runner = fastcss.one_pass(model, engine=engine)
    names = list(given) if what == "two texts a sample" else None
    torch.manual_seed(0)  # some losses are of points that are drawn, sample by sample
    got = runner(**given, route=ROUTE, per_sample=names)
    assert runner.engine == ("replay" if what == "as many labels as samples" else {"auto": "vmap"}.get(engine, engine))
    torch.manual_seed(0)
    expected = one_by_one(model, given, list(given))
    assert_put_together(got, model(**given), expected)


def test_training_on_each_samples_own_labels():
    model, given = built(detr, "q_proj", "fc1"), {"pixel_values": images(size=64), "labels": boxes(1, 2, 4)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    fastcss.one_pass(model)(**given, route=ROUTE).loss.sum().backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    losses = []
    for i, task in enumerate(ROUTE.tolist()):
        if task >= 0:
            model.set_adapter(f"task{task}")
            model(**{key: value[i : i + 1] for key, value in given.items()}).loss.backward()
            losses.append(task)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert losses == [1, 0]
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=EXACT * max(1, float(gradient.abs().max())), rtol=0)


class Classes(nn.Module):
    """Scores against a matrix of classes that all samples share; ``how`` says in which way it meets the outputs."""

    def __init__(self, how: str):
        super().__init__()
        self.layer, self.how = nn.Linear(8, 8), how

    def forward(self, x, classes, sizes=(1, 1), parts=()):
        features = self.layer(x)
        scores = features @ classes.t()
        if self.how == "attends":  # leaves no trace in a shape
            return {"found": scores.softmax(-1) @ classes, "sizes": sizes}
        if self.how == "mean over samples":
            return {"scores": scores, "mean": features.mean(0)}
        if self.how == "constant":
            return {"scores": scores, "classes": classes * 2, "table": self.layer.bias * 1}
        if self.how == "folded":
            return {"scores": scores.flatten(0, 1), "parts": sum(part.sum(1) for part in parts)}
        return {"scores": scores.transpose(0, 1)}


def classes(how: str):
    return built(lambda: Classes(how), "layer")


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize(
    ("how", "message"), [("attends", "'?found'? of sample 0 alone"), ("scores", r"'scores' is \[5, 3, 3\]")]
)
def test_rows_that_are_no_samples_by_chance(how, message, mode):
    """Three classes look like three samples: that guess must be refused, by shape or by value, and the remedy work."""
    model, x, matrix = classes(how), torch.randn(3, 5, 8), torch.randn(3, 8)
    model.train(mode == "train")
    runner = fastcss.one_pass(model)
    with pytest.raises(ValueError, match=f"{message}.*route took as an entry a sample: x, classes; say per_sample="):
        runner(x, matrix, route=ROUTE)
    expected = one_by_one(model, {"x": x, "classes": matrix}, ["x"])
    for names in (["x"], "x"):
        assert_put_together(runner(x, matrix, route=ROUTE, per_sample=names), model(x, matrix), expected)
    assert_put_together(runner(x, matrix[:2], route=ROUTE), model(x, matrix[:2]),
                        one_by_one(model, {"x": x, "classes": matrix[:2]}, ["x"]))  # fmt: skip


@pytest.mark.parametrize("engine", ["vmap", "replay"])
@torch.no_grad()
def test_outputs_with_another_batch_axis_or_none(engine):
    x, matrix = torch.randn(3, 5, 8), torch.randn(2, 8)
    for how in ("folded", "constant"):
        model = classes(how)
        given = {"x": x, "classes": matrix, "parts": [torch.randn(3, 4), torch.randn(3, 2)]}
        got = fastcss.one_pass(model, engine=engine)(**given, route=ROUTE)
        samples = []
        for i, task in enumerate(ROUTE.tolist()):
            part = {**given, "x": x[i : i + 1], "parts": [t[i : i + 1] for t in given["parts"]]}
            if task >= 0:
                model.set_adapter(f"task{task}")
                samples.append(model(**part))
            else:
                with model.disable_adapter():
                    samples.append(model(**part))
        assert_put_together(got, model(**given), samples)
    runner = fastcss.one_pass(classes("mean over samples"), engine=engine)
    with pytest.raises(ValueError, match=r"output 'mean', \[5, 8\] for each sample, has no batch axis"):
        runner(x, matrix, route=ROUTE)
    assert runner(x[:1], matrix, route=ROUTE[:1])["mean"].shape == (5, 8)


@torch.no_grad()
def test_what_cannot_be_cut_is_refused_by_name():
    runner = fastcss.one_pass(classes("scores"))
    x, matrix = torch.randn(3, 5, 8), torch.randn(2, 8)
    with pytest.raises(KeyError, match="per_sample names 'y', and the inputs are x, classes"):
        runner(x, matrix, route=ROUTE, per_sample=["x", "y"])
    with pytest.raises(ValueError, match="per_sample names 'classes', which has no 3 entries"):
        runner(x, matrix, route=ROUTE, per_sample=["x", "classes"])
    with pytest.raises(ValueError, match="there is no route"):
        runner(x, matrix, per_sample=["x"])
    with pytest.raises(ValueError, match=r"'parts' is a list of 3 tensors of length 3.*per_sample="):
        runner(x, matrix, parts=[torch.randn(3, 2)] * 3, route=ROUTE)
    ragged, runner = [torch.randn(n) for n in (1, 2, 4)], fastcss.one_pass(classes("scores"), engine="vmap")
    with pytest.raises(RuntimeError, match="engine 'vmap' cannot run the model: the inputs of the samples differ"):
        runner(x, matrix, parts=ragged, route=ROUTE)


@torch.no_grad()
def test_sizes_are_no_samples_and_no_samples_are_a_batch():
    model, x, matrix = classes("attends"), torch.randn(3, 5, 8), torch.randn(2, 8)
    runner = fastcss.one_pass(model)
    got = runner(x[:2], matrix[:1], sizes=(32, 48), route=ROUTE[:2])
    assert tuple(got["sizes"]) == (32, 48)
    empty = runner(x[:0], matrix, route=ROUTE[:0])
    assert empty["found"].shape == model(x[:0], matrix)["found"].shape
