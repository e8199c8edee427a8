"""Bad input that only the ops of the model's own pass know."""

from __future__ import annotations

import pytest
import torch
from arguments import ARGUMENTS, refused

from fastcss import ops


@pytest.mark.parametrize("name", ["logits", "reference_points", "offsets"])
def test_sizes_of_queries(name):
    """Each of its dimensions is that of the others, and none is broadcast."""
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
    """On a GPU a tensor of them would have to be waited for."""
    message = f"spatial_shapes must be a list of (height, width), got {type(wrong).__name__}"
    refused("deformable_attention", TypeError, message, spatial_shapes=wrong)


def test_levels_as_lists_of_lists():
    """What a configuration file has."""
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
