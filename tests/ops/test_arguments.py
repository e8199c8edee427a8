"""Tests bad input of the ops: the error must come before anything is computed, and name the argument and its value."""

from __future__ import annotations

import re

import pytest
import torch
from arguments import ARGUMENTS, refused

from fastcss import ops
from fastcss._dispatch import backends


@pytest.mark.parametrize("op", ARGUMENTS)
def test_unchanged_they_are_right(op):
    getattr(ops, op)(**ARGUMENTS[op], impl="reference")


EVERY = [(op, n) for op, arguments in ARGUMENTS.items() for n, v in arguments.items() if isinstance(v, torch.Tensor)]
FLOATS = [(op, name) for op, name in EVERY if name not in ("labels", "index")]
FIRST = {op: next(iter(arguments)) for op, arguments in ARGUMENTS.items()}
OTHERS = [(op, name) for op, name in FLOATS if name != FIRST[op]]
#: These may have any number of dimensions, or one of two.
OF_ANY_RANK = [("cost_filter", "text"), ("top_margin", "logits")]


def doubled(op: str) -> dict:
    """Return arguments in a dtype that no kernel takes."""
    floats = {name for other, name in FLOATS if other == op}
    return {name: value.double() if name in floats else value for name, value in ARGUMENTS[op].items()}


@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_no_tensor(op, name):
    with pytest.raises(TypeError, match=rf"^{op}: {name} must be .*\[.*\], got list"):
        getattr(ops, op)(**ARGUMENTS[op] | {name: [[[1.0]]]})


ATTENTION = ("bi_attention", "window_attention", "relative_attention")


def test_numbers_and_flags():
    for op in ("affinity_attention", "class_affinity", "affinity_loss", *ATTENTION):
        for wrong in ("1", torch.ones(())):
            refused(op, TypeError, f"scale must be a number, got {type(wrong).__name__}", scale=wrong)
    for op in ("affinity_attention", "class_affinity"):
        refused(op, TypeError, "mean must be True or False, got int", mean=1)
    refused("merge_masks", TypeError, "return_score must be True or False, got str", return_score="no")
    for op in ("affinity_loss", "top_margin"):
        refused(op, TypeError, "ignore_index must be an integer, got float", ignore_index=255.0)
    # Labels are counted in 32 bits: a larger number would be that of a class.
    refused("affinity_loss", ValueError, f"ignore_index must be at most {2**31 - 1}, got {2**32}", ignore_index=2**32)
    refused("affinity_loss", ValueError, "num_classes must be at least 1, got 0", num_classes=0)


@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_tensors_that_are_not_dense(op, name):
    right = ARGUMENTS[op][name]
    sparse, nested = right.to_sparse(), torch.nested.nested_tensor([right])
    for wrong, kind in ((sparse, "a torch.sparse_coo one"), (nested, "a nested one")):
        with pytest.raises(TypeError, match=rf"^{op}: {name} must be a dense tensor .*, got {kind}"):
            getattr(ops, op)(**ARGUMENTS[op] | {name: wrong})


@pytest.mark.parametrize(("op", "name"), [one for one in EVERY if one not in OF_ANY_RANK and one[1] != "labels"])
def test_number_of_dimensions(op, name):
    for wrong in (ARGUMENTS[op][name][0], ARGUMENTS[op][name][None]):
        with pytest.raises(ValueError, match=rf"^{op}: {name} must be \[.*, got {re.escape(str([*wrong.shape]))}"):
            getattr(ops, op)(**ARGUMENTS[op] | {name: wrong})


#: The sizes of an argument that are those of an argument before it.
SIZES = {"k": "BNK", "v": "BN", "feats": "BN", "centers": "B D", "text": "  D", "phrases": "  D", "classes": "B D"}
SIZES |= {"w1": " L", "b1": "KH", "w2": "KH", "b2": "KO", "index": "R", "scores": "K", "prototypes": " D", "bias": "C"}
SIZES |= {"offsets": ("B", " ", "heads"), "reference_points": ("B", "Q", "levels")}
SIZES |= {"v_image": ("B", "N", "heads", "D"), "v_text": ("B", "L", "heads", "D")}
SIZES |= {"pad_key": ("heads", "D"), "pad_value": ("heads", "D"), "rel_h": (" ", "D"), "rel_w": (" ", "D")}
#: These names mean another argument in other ops.
OWN_SIZES = {("bi_attention", "k"): ("B", " ", "heads", "D"), ("window_attention", "bias"): ("heads",)}
OWN_SIZES |= {
    (op, name): ("B", "H", "W", "heads", "D") for op in ("window_attention", "relative_attention") for name in "kv"
}


@pytest.mark.parametrize(("op", "name"), [one for one in (*OTHERS, ("prompt_mlp", "index")) if one[1] in SIZES])
def test_sizes_that_do_not_match(op, name):
    """A wrong size must be refused, and a size of one must not be broadcast."""
    right = ARGUMENTS[op][name]
    for dim, letter in enumerate(OWN_SIZES.get((op, name), SIZES[name])):
        for wrong in (right.narrow(dim, 0, 1), torch.cat([right, right], dim)):
            if letter != " ":
                message = rf"^{op}: {name} must be \[.*\] with .*{letter} = {right.shape[dim]}.*, got "
                with pytest.raises(ValueError, match=message + re.escape(str([*wrong.shape]))):
                    getattr(ops, op)(**ARGUMENTS[op] | {name: wrong})


#: Arguments that need not have the dtype of the first.
OF_ANY_FLOAT = [("merge_masks", "scores"), ("deformable_attention", "reference_points")]


@pytest.mark.parametrize(("op", "name"), [one for one in OTHERS if one not in OF_ANY_FLOAT])
def test_another_dtype(op, name):
    for dtype in (torch.float16, torch.float64):
        wrong = ARGUMENTS[op][name].to(dtype)
        message = f"{name} must have the dtype of {FIRST[op]}, torch.float32, got {dtype}"
        refused(op, TypeError, message, **{name: wrong})


@pytest.mark.parametrize(("op", "name"), FLOATS)
def test_integers(op, name):
    for dtype in (torch.int64, torch.uint8, torch.bool):
        wrong = ARGUMENTS[op][name].to(dtype)
        refused(op, TypeError, f"{name} must be a floating-point tensor, got {dtype}", **{name: wrong})


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, name in EVERY if name != FIRST[op]])
def test_another_device(op, name):
    wrong = ARGUMENTS[op][name].to("meta")
    refused(op, ValueError, f"{name} must be on the device of {FIRST[op]}, cpu, got meta", **{name: wrong})


@pytest.mark.parametrize("op", ARGUMENTS)
def test_unknown_implementation(op):
    refused(op, ValueError, "impl must be 'auto' or one of reference, composed, cpu, triton, cuda, got 'c'", impl="c")


@pytest.mark.parametrize("impl", ["cpu", "triton", "cuda"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_an_explicit_implementation_never_falls_back(op, impl):
    """No kernel takes float64: an error must say so, though "auto" takes the composed form."""
    arguments, call = doubled(op), getattr(ops, op)
    with pytest.raises(RuntimeError, match=f"^{op}: impl='{impl}' cannot run: .+"):
        call(**arguments, impl=impl)
    found, want = (call(**arguments, impl=impl) for impl in ("auto", "composed"))
    for one, other in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, want)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_cpu_kernels_say_which_dtypes_they_have(op):
    if backends.UNAVAILABLE["cpu"]:
        pytest.skip(backends.UNAVAILABLE["cpu"])
    arguments = doubled(op)
    message = "impl='cpu' cannot run: it takes float32, bfloat16 and float16, and the tensors are torch.float64"
    refused(op, RuntimeError, message, **arguments, impl="cpu")


# --- one op's own ----------------------------------------------------------------------------------------------------


def test_no_classes():
    message = "centers must have at least one class, got [2, 0, 5]"
    refused("class_affinity", ValueError, message, centers=torch.ones(2, 0, 5))
    message = "logits must have at least one class and one pixel, got [2, 0, 4]"
    refused("class_centers", ValueError, message, logits=torch.ones(2, 0, 4))
    message = "text must have at least one class and one prompt, got [1, 0, 2, 5]"
    refused("cost_filter", ValueError, message, text=torch.ones(0, 2, 5))
    message = "text must have at least one class and one prompt, got [2, 6, 0, 5]"
    refused("cost_filter", ValueError, message, text=torch.ones(2, 6, 0, 5))
    message = "phrases must have at least one class and one phrase, got [3, 0, 5]"
    refused("phrase_pool", ValueError, message, phrases=torch.ones(3, 0, 5))
    message = "classes must have at least one class and one channel, got [2, 0, 5]"
    refused("select_tokens", ValueError, message, classes=torch.ones(2, 0, 5))
    empty = {name: ARGUMENTS["prompt_mlp"][name][:0] for name in ("w1", "b1", "w2", "b2")}
    refused("prompt_mlp", ValueError, "w1 must have at least one class, got [0, 5, 4]", **empty)
    message = "prototypes must have at least one class, got [0, 5]"
    refused("topk_queries", ValueError, message, prototypes=torch.ones(0, 5), bias=None)
    message = "logits must be [B, C, …] with at least two classes, got [2, 1, 4]"
    refused("top_margin", ValueError, message, logits=torch.ones(2, 1, 4))


def test_centers_of_no_pixels():
    message = "logits must have at least one class and one pixel, got [2, 3, 0]"
    refused("class_centers", ValueError, message, logits=torch.ones(2, 3, 0), feats=torch.ones(2, 0, 5))


@pytest.mark.parametrize("over", ["both", "pixel", None, 1])
def test_over(over):
    refused("class_centers", ValueError, f"over must be 'pixels' or 'classes', got {over!r}", over=over)


@pytest.mark.parametrize(
    ("labels", "got"), [(torch.ones(2, 4), "torch.float32"), (torch.ones(2, 4) * 1j, "torch.complex64"), ([0], "list")]
)
def test_labels_are_integers(labels, got):
    refused("affinity_loss", TypeError, f"labels must be a tensor of integers, got {got}", labels=labels)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (2, 2, 3), (2, 4, 4), (8,), (2, 1, 2, 2), ()])
def test_labels_are_of_all_pixels(shape):
    message = f"labels must be [B, N] = [2, 4], or [B, h, w] with h·w = 4 pixels, got {[*shape]}"
    refused("affinity_loss", ValueError, message, labels=torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("wrong", "options", "message"),
    [
        (-1, {}, "at least 0 and below 2147483648, or ignore_index = 255; got values from -1 to 3"),
        (2**32, {}, "at least 0 and below 2147483648, or ignore_index = 255; got values from 0 to 4294967296"),
        (7, {"num_classes": 7}, "at least 0 and below 7, or ignore_index = 255; got values from 0 to 7"),
        (
            255,
            {"num_classes": 7, "ignore_index": -1},
            "at least 0 and below 7, or ignore_index = -1; got values from 0",
        ),
        (-2, {"ignore_index": -1}, "at least 0 and below 2147483648, or ignore_index = -1; got values from -2 to 3"),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "composed", "auto"])
def test_labels_in_range(wrong, options, message, impl):
    labels = ARGUMENTS["affinity_loss"]["labels"].clone()
    labels[1, 2] = wrong
    refused("affinity_loss", IndexError, f"labels must be {message}", labels=labels, impl=impl, **options)
