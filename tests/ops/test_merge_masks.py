"""merge_masks: every implementation × dtype × size against the float64 reference and against SAM's own code."""

from __future__ import annotations

import math
from typing import NamedTuple

import checks
import pytest
import torch
from calls import COMPILED_CUDA, DTYPES, IMPLEMENTATIONS_CUDA, LAYOUTS, Call, normal, runs
from left_out import light
from torch import Tensor
from torch.nn import functional as F

from fastcss import ops

#: Two interpolations in this dtype are off by this fraction of the largest logit.
CLEAR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Merged(NamedTuple):
    labels: Tensor
    score: Tensor


def merge_masks(masks, scores, size, **options) -> Merged:
    return Merged(*ops.merge_masks(masks, scores, size, return_score=True, **options))


def make(count, height, width, size, *, crop=None, threshold=0.0, dtype=torch.float32, device="cpu", seed=0) -> Call:
    """Blobs: smoothed noise, of which a third is mask. One score is there twice."""
    masks = 4 * normal(count, 1, (height + 3) // 4 + 1, (width + 3) // 4 + 1, seed=seed) - 1.5
    masks = F.interpolate(masks, (height, width), mode="bicubic")[:, 0] + 0.3 * normal(count, height, width, seed=seed)
    scores = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    scores[-1:] = scores[:1]
    options = {"size": size, "crop": crop, "threshold": threshold}
    return Call(merge_masks, {"masks": masks.to(device, dtype), "scores": scores.to(device)}, options)


def full_size(call: Call) -> Tensor:
    """SAM's logits [K, H, W] in float64."""
    masks, size, crop = call.tensors["masks"].double(), call.options["size"], call.options["crop"]
    whole = F.interpolate(masks[:, None], scale_factor=4, mode="bilinear", align_corners=False)
    whole = whole if crop is None else whole[..., : crop[0], : crop[1]]
    return F.interpolate(whole, size, mode="bilinear", align_corners=False)[:, 0]


def assert_merged(call: Call, impl: str, least_clear: float | None = None) -> None:
    """Check against float64 wherever masks within rounding of the threshold would change nothing: at most pixels."""
    logits, scores, threshold = full_size(call), call.tensors["scores"], call.options["threshold"]
    dtype = call.tensors["masks"].dtype if impl in ("reference", "composed") else torch.float32
    largest = max(1, call.tensors["masks"].abs().amax().item() if logits.numel() else 1)
    labels, others = (painted(logits > threshold + by * CLEAR[dtype] * largest, scores) for by in (1, -1))
    clear = labels == others
    least_clear = (0.95 if dtype == torch.float32 else 0.5) if least_clear is None else least_clear
    assert clear.double().mean() >= least_clear
    found = call.outputs(impl)
    assert found["labels"].dtype == torch.int64
    assert torch.equal(found["labels"][clear], labels[clear])
    assert torch.equal(found["score"], torch.cat([scores.new_zeros(1), scores])[found["labels"]])
    assert torch.equal(ops.merge_masks(**call.tensors, **call.options, impl=impl), found["labels"])


def painted(above: Tensor, scores: Tensor) -> Tensor:
    """The masks [K, H, W] over each other, the best last."""
    labels = torch.zeros(above.shape[1:], dtype=torch.int64, device=above.device)
    for k in scores.argsort(descending=True, stable=True).flip(0).tolist():
        labels[above[k]] = k + 1
    return labels


CASES = {  # K, h, w, size, crop
    "one pixel": (1, 1, 1, (1, 1), None),
    "no masks": (0, 5, 7, (9, 11), None),
    "a pixel made large": (3, 1, 1, (13, 9), (3, 2)),
    "to one pixel": (3, 9, 7, (1, 1), None),
    "as it is": (5, 9, 7, (36, 28), None),
    "larger": (5, 16, 16, (71, 75), (43, 64)),
    "smaller": (20, 33, 31, (37, 21), (100, 124)),
    "larger and smaller": (3, 20, 12, (33, 75), None),
    "a row": (3, 24, 24, (1, 77), (96, 5)),
    "its height as it is": (3, 9, 7, (30, 45), (30, 20)),
    "its width as it is": (3, 9, 7, (45, 20), (30, 20)),
}
LARGE = {"K 20": (20, 64, 64, (187, 250), (192, 256)), "K 150": (150, 40, 33, (150, 97), None)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda case, dtype: dtype == torch.float32 and case not in LARGE)
def test_labels_and_scores(impl, case, dtype, device):
    *sizes, crop = (CASES | LARGE)[case]
    assert_merged(make(*sizes, crop=crop, dtype=dtype, device=device), impl)


# --- SAM -------------------------------------------------------------------------------------------------------------


def sam(call: Call) -> Tensor:
    """The post-processing of transformers, then the masks over each other."""
    image_processing = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    masks, options = call.tensors["masks"], call.options
    pad = {"height": 4 * masks.shape[1], "width": 4 * masks.shape[2]}
    crop = options["crop"] or tuple(pad.values())
    whole = image_processing.SamImageProcessorPil().post_process_masks(
        [masks.cpu()[:, None]], [options["size"]], [crop], mask_threshold=options["threshold"], pad_size=pad
    )
    return painted(whole[0][:, 0], call.tensors["scores"].cpu())


@pytest.mark.parametrize("threshold", [0.0, 1.5])
@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize(
    "size", [(375, 500), (640, 480), (1024, 683), (1200, 1600)], ids=lambda size: f"{size[0]}x{size[1]}"
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda: False)
def test_is_what_sam_gives(impl, size, count, threshold, device):
    """The pixels of a picture whose longer side was made 1024 must agree: 99.99% of them at least."""
    scale = 1024 / max(size)
    crop = tuple(int(side * scale + 0.5) for side in size)
    call = make(count, 256, 256, size, crop=crop, threshold=threshold, device=device, seed=count)
    (labels, _), want = call(impl), sam(call).to(device)
    assert (labels == want).double().mean() >= 0.9999
    assert want.unique().numel() > count / 2


# --- thresholds, ties, NaN -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [-2.0, 1, math.inf, -math.inf])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_thresholds(impl, threshold, device):
    """Above infinity there is nothing, above its opposite everything."""
    call = make(5, 12, 9, (33, 40), threshold=threshold, device=device)
    if math.isfinite(threshold):
        return assert_merged(call, impl)
    best = call.tensors["scores"].argmax() + 1 if threshold < 0 else 0
    assert (call.outputs(impl)["labels"] == best).all()
    return None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
@light(lambda dtype: dtype == torch.float32)
def test_at_the_threshold_is_no_mask(impl, dtype, device):
    """Whole numbers and weights in eighths: exact in any dtype. Equal scores go to the lower mask."""
    masks = torch.zeros(4, 2, 3)
    masks[0, 0, 0], masks[1, 0], masks[2] = 1, 1, 2
    masks[2, 0, 0] = masks[3, 1, 2] = -1
    scores = torch.tensor([0.5, 0.5, 0.25, 0.75])
    call = Call(
        merge_masks, {"masks": masks.to(device, dtype), "scores": scores.to(device)}, {"size": (8, 12), "crop": None}
    )
    for threshold in (0.0, 1.0, 2.0, -1.0):
        want = painted(full_size(call) > threshold, scores)
        assert torch.equal(call.having(threshold=threshold).outputs(impl)["labels"], want)


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_nan_logits_are_no_mask(impl, device):
    """Pixels that a NaN reaches must have no mask; one with weight 0 may count, but the next logit's pixels must
    not."""
    call = make(5, 12, 9, (33, 40), device=device)
    call.tensors["masks"][2, 4:7, 3] = math.nan
    call.tensors["masks"][4] = math.nan
    got, least = call.outputs(impl)["labels"], full_size(call)
    call.tensors["masks"][2, 3:8, 2:5] = math.nan
    most = full_size(call)
    assert least[2].isnan().any()
    assert (
        (got == painted(least > 0, call.tensors["scores"])) | (got == painted(most > 0, call.tensors["scores"]))
    ).all()
    assert (got[least[2].isnan()] != 3).all()
    assert (got != 5).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS_CUDA])
def test_scores_of_any_kind(impl, device):
    """NaN first, then by size, negative and infinite ones too; of any dtype; equal ones by mask."""
    masks = torch.ones(6, 2, 2, device=device)
    for scores, best in (
        ([-3.0, math.inf, math.nan, 5.0, math.nan, 9.0], 3),
        ([-3.0, -math.inf, -1.0, -1.0, -2.0, -9.0], 3),
        ([0.0, -0.0, 0.0, 0.0, 0.0, 0.0], 1),
    ):
        for dtype in (*DTYPES, torch.float64):
            given = torch.tensor(scores, dtype=dtype, device=device)
            labels, score = ops.merge_masks(masks, given, (3, 5), return_score=True, impl=impl)
            assert (labels == best).all()
            torch.testing.assert_close(score, given[best - 1].expand(3, 5), rtol=0, atol=0, equal_nan=True)


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, device):
    call = make(5, 12, 9, (33, 40), crop=(40, 36), device=device)
    scores = torch.stack([call.tensors["scores"]] * 2, 1)[:, 0]
    assert_merged(call.having(masks=LAYOUTS[layout](call.tensors["masks"]), scores=scores), impl)


# --- the same again, torch.library, torch.compile, torch.vmap --------------------------------------------------------


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_results_are_bitwise_reproducible(impl, device):
    call = make(5, 12, 9, (33, 40), crop=(40, 36), device=device)
    checks.assert_reproducible(call, impl)


@pytest.mark.parametrize("case", ["larger", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    *sizes, crop = (CASES | LARGE)[case]
    checks.assert_same_on_any_number_of_threads(make(*sizes, crop=crop))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
def test_carries_no_gradient_and_compiles(impl, device):
    call = make(3, 8, 9, (16, 20), crop=(30, 36), device=device)
    assert not any(y.requires_grad for y in call.leaves()(impl))
    checks.assert_compiles(call, impl)


@pytest.mark.parametrize("mapped", [("masks", "scores"), ("masks",), ("scores",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS_CUDA)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    call = make(3, 4, 5, (8, 9), device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("impl", COMPILED_CUDA)
def test_opcheck(impl, device):
    for count in (3, 0):
        masks, scores = make(count, 8, 9, (16, 20), device=device).tensors.values()
        order = scores.argsort(descending=True, stable=True)
        for want_score in (True, False):
            checks.opcheck("merge_masks", impl, masks, scores, order, 16, 20, 30, 36, 0.0, want_score)
