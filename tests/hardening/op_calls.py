"""Calls of every op of ``fastcss.ops``, made by the op's own tests, and what can be drawn at random about each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import affinity
import bi_inputs
import calls
import deformable
import lora_inputs
import relative_inputs
import select_inputs
import test_affinity_attention
import test_affinity_loss
import test_class_affinity
import test_class_centers
import test_cost_filter
import test_deformable_attention
import test_merge_masks
import test_phrase_pool
import test_prompt_mlp
import test_top_margin
import test_topk_queries
import torch
import window_inputs
from calls import Call, normal
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, booleans, just, lists, sampled_from, tuples
from torch import Tensor

from fastcss.ops import cost_filter, filtered_argmax, multi_lora, pack_text, scatter_cost, top_classes

# --- ops whose own tests make no Call --------------------------------------------------------------------------------


def lora(x, weight, a, b, bias=None, *, packed, impl, **options) -> Tensor:
    return multi_lora(x, weight, dataclasses.replace(packed, a=a, b=b), bias, impl=impl, **options)


def make_lora(mode, rows, inputs, outputs, ranks, *, seed=0, **options) -> Call:
    """Make a call of multi_lora; mode "routed" has a slot for each adapter and one for the bare layer, in any order."""
    slots = torch.randperm(len(ranks) + 1, generator=torch.Generator().manual_seed(seed)) - 1
    index = slots.tolist() if mode == "routed" else None
    made = lora_inputs.make(mode, rows, inputs, outputs, ranks, index=index, seed=seed, **options)
    tensors = {name: tensor for name, tensor in zip(made._fields[:5], made[:5], strict=True) if tensor is not None}
    return Call(lora, tensors, {"packed": made.lora, "mode": mode, "index": made.index})


class Packed(NamedTuple):
    cost: Tensor
    index: Tensor
    score: Tensor
    scattered: Tensor


def packed_filter(image, text, *, k, impl) -> Packed:
    """``cost_filter`` with text from ``pack_text``, and the cost of the first prompts among that of all classes."""
    found = cost_filter(image, pack_text(text, impl=impl), k, impl=impl)
    first = found._replace(cost=found.cost[:, :, 0])
    scattered = scatter_cost(first, text.shape[-3])
    assert torch.equal(filtered_argmax(first), scattered.argmax(dim=1))
    return Packed(*found, scattered)


def make_packed(*shape, **options) -> Call:
    return dataclasses.replace(test_cost_filter.make(*shape, **options), op=packed_filter)


def make_scores(batch, classes, k, *, seed=0, dtype=torch.float32, device="cpu") -> Call:
    return Call(top_classes, {"score": normal(batch, classes, seed=seed, dtype=dtype, device=device)}, {"k": k})


def make_masks(count, sides, size, **options) -> Call:
    (height, width), crop = sides
    return test_merge_masks.make(count, height, width, size, crop=crop, **options)


def assert_merged(call: Call, impl: str, tolerance: float, **options) -> None:
    test_merge_masks.assert_merged(call, impl, least_clear=0)


def assert_margins(call: Call, impl: str, tolerance: float, **options) -> None:
    """The curvature is what is left of two terms of the probabilities' size: nothing, where a pixel is sure."""

    def peers(name: str, exact: dict[str, Tensor], dys: tuple[Tensor, ...]) -> list[Tensor]:
        return [exact[name], *([exact["p_true"]] if name == "curvature" else [])]

    calls.assert_as_good_as_eager(call, impl, tolerance, peers=peers, **options)


# --- what can be drawn -----------------------------------------------------------------------------------------------

#: ``n(least, most)``: a size.
Sizes = Callable[[int, int], SearchStrategy[int]]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Says how to make a call of an op, with which shapes and options, and how to compare it with the reference.

    Attributes:
        example: a shape whose call is shared out among threads, and does not take long.
        small: a shape with a few elements in each dimension.
    """

    make: Callable[..., Call]
    shapes: Callable[[Sizes], SearchStrategy[tuple]]
    compare: Callable[..., None] = calls.assert_as_good_as_eager
    options: dict[str, SearchStrategy] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    example: tuple
    small: tuple


def _windows(n: Sizes) -> SearchStrategy[tuple]:
    windows = n(1, 8).flatmap(lambda window: tuples(just(window), st.integers(0, window - 1)))
    return tuples(tuples(n(0, 3), n(0, 20), n(0, 20), n(1, 4), n(1, 40)), windows).map(
        lambda parts: parts[0] + parts[1]
    )


def _crops(n: Sizes) -> SearchStrategy[tuple]:
    def within(sides):
        return tuples(just(sides), st.none() | tuples(*(st.integers(1, 4 * side) for side in sides)))

    return tuples(n(1, 40), n(1, 40)).flatmap(within)


def _levels(n: Sizes) -> SearchStrategy[tuple]:
    return lists(tuples(n(1, 12), n(1, 12)), min_size=1, max_size=5).map(tuple)


SCALES, FLAGS = sampled_from([1.0, -0.37, 0.0, 3]), booleans()

COST_FILTER = Drawn(
    test_cost_filter.make,
    lambda n: tuples(n(0, 3), n(1, 30), n(1, 30), n(3, 80), n(1, 120), n(1, 4), n(1, 40)),
    test_cost_filter.assert_as_good_as_eager,
    {"shared": FLAGS},
    example=(2, 12, 13, 40, 59, 2, 9),
    small=(2, 2, 3, 4, 5, 2, 3),
)

#: The functions of ``fastcss.ops``; those around ``cost_filter`` are in "packed_filter".
OPS = {
    "affinity_attention": Drawn(
        test_affinity_attention.make,
        lambda n: tuples(n(0, 3), n(0, 110), n(0, 70), n(0, 80)),
        affinity.assert_as_good_as_eager,
        {"scale": SCALES, "mean": FLAGS},
        example=(2, 200, 33, 40),
        small=(2, 5, 3, 4),
    ),
    "class_affinity": Drawn(
        test_class_affinity.make,
        lambda n: tuples(n(0, 3), n(0, 110), n(0, 70), n(0, 80), n(1, 60)),
        affinity.assert_as_good_as_eager,
        {"scale": SCALES, "mean": just(True)},
        example=(2, 200, 33, 40, 21),
        small=(2, 5, 3, 4, 2),
    ),
    "affinity_loss": Drawn(
        test_affinity_loss.make,
        lambda n: tuples(n(0, 3), n(0, 110), n(0, 70), n(1, 30)),
        affinity.assert_as_good_as_eager,
        {"scale": SCALES, "ignored": sampled_from([0.0, 0.2, 1.0])},
        example=(2, 200, 33, 5),
        small=(2, 5, 3, 3),
    ),
    "class_centers": Drawn(
        test_class_centers.make,  # one pixel alone has no gradient, and its rounding no size
        lambda n: tuples(n(0, 3), n(1, 60), n(2, 200), n(0, 80)),
        affinity.assert_as_good_as_eager,
        {"over": sampled_from(["pixels", "classes"])},
        example=(2, 21, 200, 40),
        small=(2, 3, 5, 4),
    ),
    "cost_filter": COST_FILTER,
    "packed_filter": dataclasses.replace(COST_FILTER, make=make_packed),
    "top_classes": Drawn(
        make_scores,
        lambda n: tuples(n(0, 4), n(1, 1500), n(1, 1500)),
        example=(5, 500, 40),
        small=(2, 6, 3),
    ),
    "phrase_pool": Drawn(
        test_phrase_pool.make,  # of one channel no cosine has a gradient, and its rounding no size
        lambda n: tuples(n(0, 6), n(1, 60), n(1, 60), n(2, 80)),
        test_phrase_pool.assert_as_good_as_eager,
        example=(3, 21, 7, 40),
        small=(2, 3, 4, 5),
    ),
    "select_tokens": Drawn(
        select_inputs.make,
        lambda n: tuples(n(0, 3), n(0, 300), n(1, 40), n(4, 80), n(1, 300)),
        select_inputs.assert_as_good_as_eager,
        {"threshold": sampled_from([0.1, 0.0, -0.3]), "presence": sampled_from(["all", "best"])},
        example=(3, 200, 21, 40, 150),
        small=(2, 6, 3, 4, 7),
    ),
    "prompt_mlp": Drawn(
        test_prompt_mlp.make,
        lambda n: tuples(n(0, 30), n(1, 9), n(0, 90), n(0, 90), n(0, 90)),
        example=(20, 5, 65, 33, 97),
        small=(4, 3, 4, 5, 3),
    ),
    "merge_masks": Drawn(
        make_masks,
        lambda n: tuples(n(0, 20), _crops(n), tuples(n(1, 150), n(1, 150))),
        assert_merged,
        {"threshold": sampled_from([0.0, 1.5])},
        example=(5, ((33, 31), (100, 124)), (137, 121)),
        small=(3, ((3, 4), (9, 13)), (7, 5)),
    ),
    "topk_queries": Drawn(
        test_topk_queries.make,
        lambda n: tuples(n(0, 3), n(0, 300), n(24, 80), n(1, 40), n(1, 60)),
        options={"bias": FLAGS},
        example=(3, 200, 40, 21, 30),
        small=(2, 6, 4, 3, 3),
    ),
    "top_margin": Drawn(
        test_top_margin.make,
        lambda n: tuples(n(0, 3), n(2, 60), n(0, 200)),
        assert_margins,
        options={"labelled": FLAGS, "ignored": sampled_from([0.0, 0.2, 1.0])},
        example=(3, 21, 200),
        small=(2, 3, 6),
    ),
    "deformable_attention": Drawn(
        deformable.make,
        lambda n: tuples(n(0, 3), _levels(n), n(0, 40), n(1, 4), n(1, 80), n(1, 9)),
        test_deformable_attention.assert_as_good_as_eager,
        {"box": FLAGS},
        example=(2, ((9, 13), (5, 7)), 70, 3, 33, 4),
        small=(2, ((3, 4), (2, 2)), 5, 2, 3, 2),
    ),
    "bi_attention": Drawn(
        bi_inputs.make,
        lambda n: tuples(n(0, 3), n(0, 80), n(0, 40), n(1, 4), n(1, 40)),
        options={"masks": sampled_from([(), ("text_mask",), ("image_mask",), bi_inputs.MASKS])},
        example=(3, 130, 20, 2, 33),
        small=(2, 5, 4, 2, 3),
    ),
    "window_attention": Drawn(
        window_inputs.make,
        _windows,
        window_inputs.assert_as_good_as_eager,
        {"pads": sampled_from([(), ("pad_key",), ("pad_value",), window_inputs.PADS])},
        example=(2, 14, 21, 3, 32, 7, 3),
        small=(2, 5, 6, 2, 3, 3, 1),
    ),
    "relative_attention": Drawn(
        relative_inputs.make,
        lambda n: tuples(n(0, 3), n(0, 20), n(0, 20), n(1, 4), n(1, 40), st.none() | n(1, 8)),
        relative_inputs.assert_as_good_as_eager,
        {"pads": sampled_from([(), ("pad_key",), ("pad_value",), relative_inputs.PADS])},
        example=(2, 14, 21, 3, 32, 7),
        small=(2, 3, 4, 2, 3, 2),
    ),
    "multi_lora": Drawn(
        make_lora,
        lambda n: tuples(
            sampled_from(["shared", "diverged", "routed"]),
            lists(n(0, 20), max_size=2),
            n(0, 50),
            n(0, 50),
            lists(n(0, 40), min_size=1, max_size=4),
        ),
        options={"bias": FLAGS, "lora_dtype": sampled_from([None, torch.float32])},
        example=("routed", [40], 60, 50, [8, 0, 24, 3]),
        small=("routed", [4], 6, 5, [2, 0, 3]),
    ),
}


def example(op: str, dtype: torch.dtype = torch.float32) -> Call:
    """Make a call that is shared out among threads, and does not take long."""
    return OPS[op].make(*OPS[op].example, dtype=dtype)
