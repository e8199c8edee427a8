"""Tests the benchmark cases: what work they count, and that every provider of the small ones is right."""

import itertools

import left_out
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    _steps,
    affinity_attention,
    affinity_loss,
    bi_attention,
    caa,
    class_affinity,
    class_centers,
    cost_filter,
    decouplecss,
    deformable_attention,
    fuse,
    harness,
    merge_masks,
    multi_lora,
    phrase_pool,
    prompt_mlp,
    registry,
    relative_attention,
    select_tokens,
    top_margin,
    window_attention,
)
from benchmarks._onnx import EXPORTER
from benchmarks.cases import ENGINES, MODES
from fastcss._dispatch import backends

SELECTION = ("cost_filter", "phrase_pool", "select_tokens", "prompt_mlp", "merge_masks", "topk_queries", "top_margin")


@pytest.mark.parametrize(
    ("form", "mode", "flops", "moved"),
    [
        ("shared", "fwd", 2 * 5 * 3 * 7 + 2 * 5 * 4 * 10, 4 * (15 + 28 + 40 + 70)),
        ("diverged", "fwd", 2 * 2 * 5 * 3 * 7 + 2 * 5 * 4 * 10, 4 * (30 + 28 + 40 + 70)),
        ("shared", "bwd", 2 * 210 + 3 * 400, 4 * (30 + 28 + 80 + 140)),
    ],
)
def test_work_of_multi_lora(form, mode, flops, moved):
    shape = {"form": form, "M": 5, "K": 3, "N": 7, "T": 2, "r": 2}
    assert multi_lora.work(shape, 4, mode) == (flops, moved)


@pytest.mark.parametrize(
    ("op", "mode", "flops", "moved"),
    [
        (affinity_attention, "fwd", 2 * 25 * (3 + 7), 4 * (30 + 3 * 35)),
        (affinity_attention, "bwd", 2 * 25 * (3 + 7) + 2 * 25 * (9 + 14), 4 * (60 + 8 * 35)),
        (class_affinity, "fwd", 2 * 25 * (3 + 2) + 6 * 70, 4 * (30 + 3 * 35 + 14)),
        (class_affinity, "bwd", 2 * 25 * (3 + 2) + 6 * 70 + 2 * 25 * (9 + 4) + 12 * 70, 4 * (60 + 8 * 35 + 28)),
        (affinity_loss, "fwd", 2 * 25 * 3, 4 * 30),
        (affinity_loss, "bwd", 2 * 25 * 3 + 2 * 25 * 9, 4 * 90),
        (class_centers, "fwd", 2 * 70, 4 * (10 + 35 + 14)),
        (class_centers, "bwd", 6 * 70, 8 * (10 + 35 + 14)),
    ],
)
def test_work_of_the_affinity_ops(op, mode, flops, moved):
    assert op.work({"N": 5, "K": 3, "D": 7, "C": 2}, 4, mode) == (flops, moved)


@pytest.mark.parametrize(
    ("op", "mode", "flops", "moved"),
    [
        (cost_filter, "fwd", 2 * 5 * 2 * 12 * 7 * (6 + 3), 4 * (5 * 12 * 7 + 6 * 2 * 7 + 5 * 3 * 2 * 12)),
        (cost_filter, "bwd", 2 * 5 * 2 * 12 * 7 * (6 + 9), 8 * (5 * 12 * 7 + 6 * 2 * 7 + 5 * 3 * 2 * 12)),
        (phrase_pool, "fwd", 4 * 5 * 6 * 2 * 7, 4 * (5 * 7 + 6 * 2 * 7 + 5 * 6 * 7)),
        (select_tokens, "fwd", 2 * 9 * 6 * 7, 4 * (9 * 7 + 6 * 7 + 6 * 8)),
        (prompt_mlp, "fwd", 2 * 5 * (3 * 4 + 4 * 2), 4 * 5 * (3 * 4 + 4 * 2 + 4 + 2 + 3 + 2)),
        (top_margin, "fwd", 0, 5 * 12 * (4 * (6 + 4) + 16)),
        (top_margin, "bwd", 0, 5 * 12 * (4 * (6 + 4) + 16) + 5 * 12 * 4 * (2 * 6 + 4)),
    ],
)
def test_work_of_the_selection_ops(op, mode, flops, moved):
    shape = {"B": 5, "C": 6, "D": 7, "H": 4, "W": 3, "T": 6, "P": 2, "k": 3, "M": 2, "N": 9, "length": 8}
    shape |= {"R": 5, "L": 3, "O": 2}
    assert op.work(shape, 4, mode) == (flops, moved)


@pytest.mark.parametrize(
    ("mode", "flops", "moved"),
    [
        ("fwd", 8 * 5 * 8 * 9 * (3 * 2 * 4) * 7, 4 * 5 * 8 * 9 * (21 + 3 * 24 + 21 + 4)),
        ("bwd", 24 * 5 * 8 * 9 * (3 * 2 * 4) * 7, 4 * 5 * 8 * 9 * (3 * (21 + 3 * 24) + 2 * (21 + 4))),
    ],
)
def test_work_of_deformable_attention(mode, flops, moved):
    shape = {"B": 5, "levels": [(4, 9), (6, 6)], "heads": 3, "D": 7, "points": 4}
    assert deformable_attention.work(shape, 4, mode) == (flops, moved)


@pytest.mark.parametrize(
    ("mode", "flops", "moved"),
    [
        ("fwd", 6 * 5 * 9 * 2 * 3 * 7, 4 * 5 * 21 * 3 * (9 + 2)),
        ("bwd", 18 * 5 * 9 * 2 * 3 * 7, 4 * 5 * 21 * (9 + 2) * (2 * 3 + 2)),
    ],
)
def test_work_of_bi_attention(mode, flops, moved):
    assert bi_attention.work({"B": 5, "N": 9, "L": 2, "heads": 3, "D": 7}, 4, mode) == (flops, moved)


@pytest.mark.parametrize(
    ("mode", "flops", "moved"),
    [
        ("fwd", 4 * 49 * (2 * 5 * 8 * 9 * 3 * 32 + 5 * 8 * 8 * 6 * 32), 4 * 4 * 5 * 32 * (2 * 72 * 3 + 64 * 6)),
        ("bwd", 12 * 49 * (2 * 5 * 8 * 9 * 3 * 32 + 5 * 8 * 8 * 6 * 32), 4 * 11 * 5 * 32 * (2 * 72 * 3 + 64 * 6)),
    ],
)
def test_work_of_window_attention(mode, flops, moved):
    shape = {"B": 5, "maps": [(8, 9), (8, 8)], "depths": [2, 1], "heads": [3, 6], "D": 32}
    assert window_attention.work(shape, 4, mode) == (flops, moved)


@pytest.mark.parametrize(
    ("window", "mode", "flops", "moved"),
    [
        (None, "fwd", 4 * 5 * 8 * 9 * 72 * 21 + 2 * 5 * 8 * 9 * (8 + 9) * 21, 4 * (4 * 5 * 72 * 21 + (15 + 17) * 7)),
        (6, "fwd", 4 * 5 * 8 * 9 * 36 * 21 + 2 * 5 * 8 * 9 * (6 + 6) * 21, 4 * (4 * 5 * 72 * 21 + (11 + 11) * 7)),
        (6, "bwd", 3 * 5 * 8 * 9 * 21 * (4 * 36 + 2 * 12), 4 * (11 * 5 * 72 * 21 + 3 * 22 * 7)),
    ],
)
def test_work_of_relative_attention(window, mode, flops, moved):
    shape = {"B": 5, "H": 8, "W": 9, "heads": 3, "D": 7, "window": window}
    assert relative_attention.work(shape, 4, mode) == (flops, moved)


def test_work_of_sam():
    """The map has no need of padding, which the model would compute with and which is not counted."""
    pytest.importorskip("transformers")
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    config = SamVisionConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=2, mlp_dim=80, output_channels=24, image_size=192,
        window_size=4, global_attn_indexes=[1],
    )  # fmt: skip
    config._attn_implementation = "eager"
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        SamVisionEncoder(config)(torch.randn(1, 3, 192, 192))
    assert fuse.sam_flops(config) == counter.get_total_flops()


@pytest.mark.parametrize(("size", "gflop"), [("vit-b", 972), ("vit-h", 5960)])
def test_work_of_sam_at_its_sizes(size, gflop):
    """The specification counts 4,900 tokens in windows, of which 804 fill up."""
    pytest.importorskip("transformers")
    from fastcss.models.sam import VITS

    width, layers, heads = VITS[size]
    with torch.device("meta"):
        config = fuse.random_sam(size).config
    assert (config.hidden_size, config.num_attention_heads) == (width, heads)
    padding = (layers - 4) * 804 * (8 * width**2 + 4 * 14**2 * width + 4 * 14 * width)
    assert fuse.sam_flops(config) + padding == pytest.approx(gflop * 1e9, rel=1e-3)


def test_work_of_whole_window_layers():
    """The maps are multiples of the window; the model's own products would count the padding's, otherwise."""
    shape = {"B": 2, "maps": [(14, 21), (14, 14)], "depths": [2, 1], "heads": [1, 2], "D": 32}
    blocks, flops = window_attention.swin_layers(shape, torch.float32, "cpu"), 0
    for block in blocks:
        height, width = block.input_resolution
        counter = FlopCounterMode(display=False)
        with counter:
            block(torch.randn(2, height * width, block.attention.o_proj.in_features), (height, width))
        flops += counter.get_total_flops()
    weights = sum(p.numel() for block in blocks for p in block.attention.parameters() if p.dim() == 2)
    tables = sum(block.attention.relative_position_bias.relative_position_bias_table.numel() for block in blocks)
    maps = 2 * 2 * (2 * 294 * 32 + 196 * 64)
    assert window_attention.layer_work(shape, 4) == (flops, 4 * (maps + weights - tables))


@pytest.mark.parametrize("quick", [False, True])
def test_locations_of_deformable_attention_are_exact(quick):
    """The locations must be the same in every dtype, and none may be on the border of a cell."""
    (case,) = deformable_attention.cases("cuda", quick)
    points, offsets = deformable_attention.points_and_offsets(case.shape, "cpu")
    pixels = torch.tensor([(w, h) for h, w in case.shape["levels"]])[:, None]
    half = points.bfloat16()[:, :, None, :, None] + offsets.bfloat16() / pixels
    exact = points.double()[:, :, None, :, None] + offsets.double() / pixels
    inside = (exact > 0) & (exact < 1)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half[inside].double(), exact[inside])
    cells = (exact * pixels - 0.5)[inside]
    assert (cells - cells.round()).abs().min() >= 1 / 256
    assert inside.float().mean() > 0.5


def test_work_of_caa():
    """The composed head must have no extra product; the base is one 1×1 convolution, and so is OCR's bottleneck."""
    head, ocr, base = (case.build("cpu", "fwd") for case in caa.cases("cpu", quick=True))
    counter = FlopCounterMode(display=False)
    step = head.providers["composed"]()
    with counter:
        step()
    assert head.flops == counter.get_total_flops()
    assert base.flops == 2 * 144 * 64 * 20
    assert ocr.flops - head.flops == 2 * (2 * 144 * 128 * 64)  # for both maps


def test_an_unmeasured_implementation_is_chosen_while_its_step_runs():
    before = dict(backends.MEASURED_ON_GPU)
    (chosen,) = _steps.on("cpu", lambda: (dict(backends.MEASURED_ON_GPU),))()
    assert chosen == dict.fromkeys(backends.KERNELS["cpu"], ("cpu",))
    assert before == backends.MEASURED_ON_GPU


def test_labels_count_by_their_pixels():
    labels = torch.zeros(100, 200, dtype=torch.int64)
    other = labels.clone()
    other[7, :3] = 5
    assert merge_masks.differing((other,), (labels,)) == pytest.approx(3 / 20000)
    assert merge_masks.differing((labels[1:],), (labels,)) == float("inf")


def test_the_picture_of_decouplecss_shows_some_of_the_classes():
    pytest.importorskip("peft")
    (case,) = decouplecss.cases("cpu", quick=True)
    torch.manual_seed(0)
    (labels,) = case.build("cpu", "fwd").expected()
    assert labels.shape == (96, 128)
    assert 4 < len(labels.unique()) < 18


@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")
def test_every_provider_of_the_quick_cases_is_right():
    pytest.importorskip("peft")
    absent = {name for name in ENGINES if not left_out.installed(name, *EXPORTER)}
    cases = registry.all_cases("cpu", quick=True)
    for case, mode in itertools.product(cases, MODES):
        if mode not in case.modes:
            continue
        torch.manual_seed(0)
        problem = case.build("cpu", mode)
        present = {name: prepare for name, prepare in problem.providers.items() if name not in absent}
        _, errors, remarks = harness.verify(present, problem.expected(), problem)
        assert not remarks, (case.name, mode)
        assert errors["fastcss"] <= problem.tolerance


def test_the_selection_ops_tell_bfloat16_inputs_apart():
    """A GPU will get these inputs: in no provider may indices or labels depend on rounding."""
    cases = [case for case in registry.all_cases("cuda", quick=True) if case.op in SELECTION]
    for case, mode in itertools.product(cases, MODES):
        if mode not in case.modes:
            continue
        torch.manual_seed(0)
        problem = case.build("cpu", mode)
        _, _, remarks = harness.verify(problem.providers, problem.expected(), problem)
        assert not remarks, (case.name, mode)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_case_names_are_unique_and_selected_by_prefix(device):
    cases = registry.all_cases(device)
    assert len({case.name for case in cases}) == len(cases)
    shared = registry.select(cases, ["multi_lora"], ["shared-"])
    assert {case.name.split("-")[0] for case in shared} == {"multi_lora/shared"}


def test_what_a_row_stands_on_is_there():
    """If a file is moved, its old name in ``SOURCES`` would leave it out of ``source_sha`` without a word."""
    patterns = {pattern for case in registry.all_cases("cuda") for pattern in case.sources}
    assert [pattern for pattern in sorted(patterns) if not any(harness.ROOT.glob(pattern))] == []


def test_a_case_of_minutes_runs_where_its_name_is_given():
    cases = registry.all_cases("cpu")
    long = {"decouplecss/swin-t-vit-b-t6", "decouplecss/swin-b-vit-h-t6"}
    assert "fuse/sam-vit-h-1024" not in {case.name for case in registry.select(cases, ["fuse"])}
    assert long.isdisjoint(case.name for case in registry.select(cases))
    assert long.isdisjoint(case.name for case in registry.select(cases, ["decouplecss"]))
    assert {case.name for case in registry.select(cases, names=["decouplecss/swin"])} == long
    assert long <= {case.name for case in registry.select(registry.all_cases("cuda"))}


def test_the_grid_is_whole():
    assert len(registry.select(registry.all_cases("cpu"), names=["grid"])) == 4 * 3 * 2 * 2
