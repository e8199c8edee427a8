"""Tests what each form of the CAA head computes and costs: the published one, OCRNet's bottleneck, the ablations."""

import copy

import pytest
import torch
from caa_heads import head, literal, picture
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastcss.nn import ClassAwareAffinity
from fastcss.nn.caa import CONTEXTS

FORMS = [*({"context": name} for name in CONTEXTS), {"ocr_bottleneck": True}]


def added_parameters(module):
    """Count the parameters that the bare model does not have."""
    return sum(p.numel() for name, p in module.named_parameters() if not name.startswith("segmentation."))


def convolution_macs(module, size, forward=ClassAwareAffinity.__call__):
    """Count the MACs of the convolutions alone, as the thesis does; on the meta device."""
    counter = FlopCounterMode(display=False)
    with torch.device("meta"), counter:
        forward(module.eval(), torch.empty(size))
    return counter.get_flop_counts()["Global"][torch.ops.aten.convolution] // 2


@pytest.mark.parametrize(("bottleneck", "parameters", "gmac"), [(False, 3_089_024, 13.03), (True, 3_614_336, 17.33)])
def test_the_size_and_the_cost_come_out(bottleneck, parameters, gmac):
    """The published 3.61 M parameters count a layer that the published 13.05 GMAC do not run."""
    with torch.device("meta"):
        module = ClassAwareAffinity(512, 150, ocr_bottleneck=bottleneck)
    assert added_parameters(module) == parameters
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    assert parts == {
        "segmentation": 512 * 150 + 150, "query": 32_832, "key": 32_832, "intra": 263_168, "inter": 263_168,
        "intra_reduce": 525_312, "inter_reduce": 525_312, "center_attention": 658_944 + bottleneck * 525_312,
        "fuse": 787_456,
    }  # fmt: skip
    size, first_use = (1, 512, 64, 64), 512 * 150 * 64 * 64  # of the segmentation layer, which the bare model has too
    published = convolution_macs(module, size, literal) - first_use
    biases = (64 + 64 + 150) * 64 * 64  # one operation each, as the tools of the field count them
    assert round((published + biases) / 1e9, 2) == gmac
    # The author's code makes the centres' keys and values for each of the two maps, this code only once.
    assert convolution_macs(module, size) - first_use == published - 150 * (2 * 512 * 256 + 256 * 256)


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_ablation_has_only_what_it_runs(context):
    """An ablation must have no layer whose parameters or products would count without being used."""
    width = {"full": 3, "affinity": 3}.get(context, 2) * 12 * 12 + 2 * 12
    pair, side = 2 * (12 * 6 + 6), 12 * 12 + 2 * 12 + 2 * 12 * 12 + 2 * 12  # query and key; a conv and its reduction
    attention = 2 * (12 * 8 + 16 + 8 * 8 + 16) + 12 * 8 + 16 + 8 * 12 + 24
    sides = {"full": 2, "affinity": 2, "centers": 0}.get(context, 1)
    wanted = width + (pair + sides * side if sides else 0) + (attention if context != "affinity" else 0)
    module, (features, labels) = head(context=context), picture()
    assert added_parameters(module) == wanted
    module.loss(module(features), labels).total.backward()
    assert [name for name, p in module.named_parameters() if p.grad is None] == []
    pixels, classes = 64, 5
    queries = {"full": 2, "affinity": 0}.get(context, 1) * (12 * 8 + 8 * 8 + 8 * 12) * pixels
    centers = classes * (2 * 12 * 8 + 8 * 8) if context != "affinity" else 0
    segmentation = 12 * 5 * pixels * (1 if context == "affinity" else 2)
    layers = (2 * 12 * 6 if sides else 0) + sides * 3 * 12 * 12 + {2: 3}.get(sides, 2) * 12 * 12
    assert convolution_macs(module.to("meta"), (1, 12, 8, 8)) == queries + centers + segmentation + pixels * layers


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form.values())))
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_the_equations(training, form, device):
    module = head(device=device, **form).double().train(training)
    features, labels = picture(device)
    features = features.double().requires_grad_()
    output, expected = module(features), literal(copy.deepcopy(module), features)
    for got, want in zip(output, expected, strict=True):
        torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(module.loss(o, labels).total, features)[0] for o in (output, expected))
    torch.testing.assert_close(got, want)


def test_weights_of_a_layer_that_does_not_run_are_not_dropped_in_silence():
    with_layer, without = head(ocr_bottleneck=True), head()
    wanted = r"center_attention.bottleneck.0.weight, .*: of a layer .* ocr_bottleneck=True alone"
    with (
        pytest.warns(UserWarning, match=wanted),
        pytest.raises(RuntimeError, match=r"Unexpected key.*bottleneck"),
    ):
        without.load_state_dict(with_layer.state_dict())
    outer = nn.Sequential(without)
    with pytest.warns(UserWarning, match=f"0.{wanted}"):
        found = outer.load_state_dict(nn.Sequential(with_layer).state_dict(), strict=False)
    assert {key.rpartition("bottleneck")[0] for key in found.unexpected_keys} == {"0.center_attention."}
    with pytest.raises(RuntimeError, match=r"Missing key.*bottleneck"):
        with_layer.load_state_dict(without.state_dict())
    live = {key: value for key, value in with_layer.state_dict().items() if "bottleneck" not in key}
    without.load_state_dict(live)  # as the docstring says
    with_layer.eval().center_attention.bottleneck = None
    assert torch.equal(without.eval()(picture()[0]).logits, with_layer(picture()[0]).logits)
