"""Tests bad input that only the ops of the model's own pass know."""

from __future__ import annotations

import pytest
import torch
from arguments import ARGUMENTS, refused

from fastcss import ops


@pytest.mark.parametrize("name", ["logits", "reference_points", "offsets"])
def test_sizes_of_queries(name):
    """Each dimension must be that of the other arguments, and none may be broadcast."""
    right = ARGUMENTS["deformable_attention"][name]
    for dim in range(right.dim() - (name != "logits")):
        for wrong in (right.narrow(dim, 0, 1), torch.cat([right, right], dim)):
            with pytest.raises(ValueError, match=r"^deformable_attention: .* must be \[.*\] with .*, got \["):
                ops.deformable_attention(**ARGUMENTS["deformable_attention"] | {name: wrong})


@pytest.mark.parametrize("coordinates", [0, 1, 3, 5])
def test_coordinates(coordinates):
    wrong = torch.ones(2, 4, 2, coordinates)
    message = f"reference_points must be [B, Q, levels, 2 or 4], got [2, 4, 2, {coordinates}]"
    refused("deformable_attention", ValueError, message, reference_points=wrong)
    wrong = torch.ones(2, 4, 3, 2, 6, coordinates)
    message = f"offsets must be [B, Q, heads, levels, points, 2], got [2, 4, 3, 2, 6, {coordinates}]"
    refused("deformable_attention", ValueError, message, offsets=wrong)


@pytest.mark.parametrize(
    ("shapes", "total"), [([(2, 3), (1, 1)], 7), ([(3, 3), (1, 2)], 11), ([(2, 3), (2, 3)], 12), ([(1, 1), (1, 1)], 2)]
)
def test_levels_are_all_tokens(shapes, total):
    message = f"spatial_shapes must add up to the S = 8 tokens of value, got {total}"
    refused("deformable_attention", ValueError, message, spatial_shapes=shapes)


@pytest.mark.parametrize(
    "shapes",
    [[], [(2, 4)], [(2, 3), (1, 1), (1, 1)], [(2, 3), (1,)], [(2, 3, 1), (1, 2)], ((2, 3), ()), [2, 3], [(2, 3), 2]],
)
def test_number_of_levels(shapes):
    message = f"spatial_shapes must be 2 pairs (height, width), got {[*shapes]}"
    refused("deformable_attention", ValueError, message, spatial_shapes=shapes)


@pytest.mark.parametrize(
    "wrong", [(0, 7), (2, 0), (-2, -3), (2.0, 3.0), (2, "3"), (2, None), "23", (torch.tensor(2), 3)]
)
def test_sizes_of_levels(wrong):
    refused(
        "deformable_attention", ValueError, "spatial_shapes must be whole numbers of at", spatial_shapes=[wrong, (1, 2)]
    )


@pytest.mark.parametrize("wrong", [torch.tensor([[2, 3], [1, 2]]), None, 8, {(2, 3), (1, 2)}])
def test_levels_are_a_list(wrong):
    """A tensor of level shapes must be refused: the host would have to wait for it on a GPU."""
    message = f"spatial_shapes must be a list of (height, width), got {type(wrong).__name__}"
    refused("deformable_attention", TypeError, message, spatial_shapes=wrong)


def test_levels_as_lists_of_lists():
    """A configuration file gives lists of lists: these must work."""
    arguments = ARGUMENTS["deformable_attention"]
    want = ops.deformable_attention(**arguments)
    assert torch.equal(ops.deformable_attention(**arguments | {"spatial_shapes": [[2, 3], [1, 2]]}), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_reference_points_of_any_dtype(dtype):
    arguments = ARGUMENTS["deformable_attention"]
    points = (torch.arange(32).view(2, 4, 2, 2) / 32).to(dtype)
    found = [ops.deformable_attention(**arguments | {"reference_points": p}) for p in (points, points.float())]
    assert torch.equal(*found)
    assert found[0].dtype == torch.float32


# --- bi_attention ----------------------------------------------------------------------------------------------------

MASKS = pytest.mark.parametrize(
    ("name", "letters", "shape"), [("text_mask", "B, L", (2, 6)), ("image_mask", "B, N", (2, 4))]
)


@MASKS
def test_masks_are_bool(name, letters, shape):
    """Masks must be bool: an additive or an integer mask would mean something else."""
    for dtype in (torch.float32, torch.int64, torch.uint8):
        message = f"{name} must be bool, True where a token is not read, got {dtype}"
        refused("bi_attention", TypeError, message, **{name: torch.zeros(shape, dtype=dtype)})
    message = f"{name} must be a tensor [{letters}], got list"
    refused("bi_attention", TypeError, message, **{name: [[True]]})


@MASKS
def test_sizes_of_masks(name, letters, shape):
    """A mask must cover all tokens of all samples; it must not be broadcast."""
    batch, tokens = shape
    for wrong in ((1, tokens), (batch, 1), (batch, tokens + 1), (tokens,), (batch, 1, tokens), (batch, 3, 4, 6)):
        message = f"{name} must be [{letters}] with B = {batch}, {letters[-1]} = {tokens}, got {[*wrong]}"
        refused("bi_attention", ValueError, message, **{name: torch.zeros(wrong, dtype=torch.bool)})


@MASKS
def test_device_of_masks(name, letters, shape):
    message = f"{name} must be on the device of q, cpu, got meta"
    refused("bi_attention", ValueError, message, **{name: torch.zeros(shape, dtype=torch.bool, device="meta")})


# --- window_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, -1])
def test_window_of_nothing(window):
    for op in ("window_attention", "relative_attention"):
        refused(op, ValueError, f"window must be at least 1, got {window}", window=window)


@pytest.mark.parametrize("window", [2.0, "2", None, True, (2, 2), torch.tensor(2)])
def test_window_is_an_integer(window):
    message = f"window must be an integer, got {type(window).__name__}"
    refused("window_attention", TypeError, message, window=window)
    if window is not None:
        refused("relative_attention", TypeError, message, window=window)


@pytest.mark.parametrize("shift", [-1, 2, 3, 1.0, True, None, "1", (1, 1)])
def test_shift(shift):
    message = f"shift must be a whole number of at least 0 and below window = 2, got {shift!r}"
    refused("window_attention", ValueError, message, shift=shift)


@pytest.mark.parametrize("shape", [(3, 9, 9), (3, 4, 9), (3, 9, 4), (3, 1, 1), (3, 4, 1), (3, 2, 2)])
def test_bias_of_another_window(shape):
    message = f"bias must be [heads, window², window²] = [3, 4, 4], got {[*shape]}"
    refused("window_attention", ValueError, message, bias=torch.ones(shape))


def test_bias_as_the_models_table():
    """A bias as the model's table, [(2w - 1)², heads], or with a batch dimension, must be refused."""
    for shape in ((9, 3), (1, 3, 4, 4)):
        message = f"bias must be [heads, window², window²] with heads = 3, got {[*shape]}"
        refused("window_attention", ValueError, message, bias=torch.ones(shape))


@pytest.mark.parametrize("op", ["window_attention", "relative_attention"])
def test_pads_are_not_of_the_batch(op):
    message = "pad_key must be [heads, D] with heads = 3, D = 5, got [2, 3, 5]"
    refused(op, ValueError, message, pad_key=torch.ones(2, 3, 5))
    message = "pad_value must be [heads, D] with heads = 3, D = 5, got [15]"
    refused(op, ValueError, message, pad_value=torch.ones(15))


# --- relative_attention ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 6, 27])
def test_tables_of_another_size(rows):
    """They must be refused: the models resize them, each in its own way. The map is 4 × 6, the window 3."""
    end = f"got [{rows}, 5]; a table of another size must be resized first"
    for name, letter, size in (("rel_h", "H", 7), ("rel_w", "W", 11)):
        table = {name: torch.ones(rows, 5)}
        refused("relative_attention", ValueError, f"{name} must be [2·window−1, D] = [5, 5], {end}", **table)
        right = {"rel_h": torch.ones(7, 5), "rel_w": torch.ones(11, 5), "window": None}
        message = f"{name} must be [2·{letter}−1, D] = [{size}, 5], {end}"
        refused("relative_attention", ValueError, message, **right | table)


def test_tables_of_each_head():
    """A head has no tables of its own."""
    message = "rel_w must be [2·Sw−1, D] with D = 5, got [3, 5, 5]"
    refused("relative_attention", ValueError, message, rel_w=torch.ones(3, 5, 5))


@pytest.mark.parametrize("op", ["bi_attention", "window_attention", "relative_attention"])
def test_no_channels(op):
    """Tensors without channels have nothing to compare and nothing to read."""
    empty = {n: v[..., :0] if n != "bias" and torch.is_tensor(v) else v for n, v in ARGUMENTS[op].items()}
    for impl in ("auto", "reference", "composed"):
        out = getattr(ops, op)(**empty, impl=impl)
        for side in (out,) if torch.is_tensor(out) else out:
            assert side.shape[-1] == 0
