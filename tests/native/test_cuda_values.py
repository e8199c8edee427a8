"""The kernels of csrc/cuda, run on the CPU: both ways of launching them, their threads in several orders, against the
float64 reference. What a GPU adds to this is speed."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy
import pytest
import torch
from cuda_build import CudaOnCpu, build
from torch import Tensor

from fastcss._dispatch import nvrtc
from fastcss._launchers import LAUNCHERS
from fastcss.reference import cost_filter, merge_masks, prompt_mlp, select_tokens


@pytest.fixture(scope="module")
def on_cpu(pytestconfig) -> CudaOnCpu:
    return CudaOnCpu(build(pytestconfig.cache.mkdir("cuda_on_cpu")))


@pytest.fixture
def run(on_cpu, monkeypatch):
    """``run(op, …)``: what both launchers give, bit by bit the same whatever order a block's threads run in."""
    monkeypatch.setattr(nvrtc, "launch_packed", on_cpu.launch)

    def run(op: str, *arguments) -> tuple[Tensor, ...]:
        compiled, by_python = getattr(torch.ops.fastcss, op).cuda, LAUNCHERS[op]
        found = []
        for order, launcher in enumerate((compiled, by_python, compiled)):
            on_cpu.set_order(order)
            found.append(launcher(*arguments))
        for other in found[1:]:
            for a, b in zip(found[0], other, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        return found[0]

    return run


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inside(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides, among others that no kernel may read: NaN, or an index far outside."""
    if layout == "dense":
        return tensor
    bad = float("nan") if tensor.is_floating_point() else 1 << 40
    order = range(tensor.dim()) if layout == "slice" else range(tensor.dim())[::-1]
    shape = [tensor.shape[d] for d in order]
    whole = torch.full([2 * size + 3 if layout != "slice" else size + 3 for size in shape], bad, dtype=tensor.dtype)
    step = 1 if layout == "slice" else 2
    view = whole[tuple(slice(1, 1 + step * size, step) for size in shape)].permute(
        [order.index(d) for d in range(tensor.dim())]
    )
    return view.copy_(tensor)


def assert_near(got: Tensor, want: Tensor, eager: Tensor) -> None:
    """No further from float64 than the literal code in this dtype, and half a rounding of the result."""
    error, theirs = ((x.double() - want).norm() for x in (got, eager))
    unit = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}[got.dtype]
    assert error <= 1.2 * theirs + unit * want.norm(), (error, theirs, want.norm())


INPUTS = pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        (torch.float32, "dense"),
        (torch.float32, "transposed"),
        (torch.bfloat16, "dense"),
        (torch.bfloat16, "slice"),
        (torch.float16, "transposed"),
    ],
)


@INPUTS
@pytest.mark.parametrize(
    ("rows", "classes", "k"), [(3, 37, 5), (1, 1, 1), (2, 33, 33), (1, 9001, 70), (2, 1300, 1300), (0, 5, 2), (2, 0, 0)]
)
def test_top_classes(run, rows, classes, k, dtype, layout):
    score = normal(rows, classes, dtype=dtype)
    if classes > 30:
        score[0, 3:9] = float("nan")
        score[0, 20:24] = torch.tensor([0.0, -0.0, 0.0, -0.0])
        score[-1, ::3] = 1.5  # more ties than are wanted
        score[-1, 1], score[-1, 2] = float("inf"), -float("inf")
    values, index = run("top_classes", inside(score, layout), k)
    want, want_index = cost_filter.top_classes(score, k)
    assert torch.equal(index, want_index)
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)


def clear(masks, scores, order, size, crop, threshold) -> tuple[Tensor, Tensor, Tensor]:
    """Labels and scores by the float64 reference, and the pixels where a little rounding does not decide."""
    near = [
        merge_masks.merge_masks(masks.double(), scores, order, size, crop, threshold + margin)
        for margin in (0, 1e-4, -1e-4)
    ]
    same = (near[0][0] == near[1][0]) & (near[0][0] == near[2][0])
    assert same.double().mean() > 0.95
    return *near[0], same


SIZES = [
    ((64, 80), (64, 80)),  # kept
    ((45, 70), (50, 77)),
    ((7, 9), (64, 80)),
    ((100, 33), (61, 13)),
    ((1, 1), (1, 1)),
]


@INPUTS
@pytest.mark.parametrize(("size", "crop"), SIZES)
def test_merge_masks(run, size, crop, dtype, layout):
    masks = 3 * normal(11, 16, 20, dtype=dtype)
    masks[:, :8] -= 5  # tiles that some masks do not reach
    masks[2] = -1
    scores = normal(11, seed=1, dtype=torch.float64 if dtype == torch.float32 else dtype).abs()
    scores[4] = scores[7]
    order = scores.argsort(descending=True, stable=True)
    labels, score, same = clear(masks, scores, order, size, crop, 0.5)
    arguments = (inside(masks, layout), inside(scores, layout), inside(order, layout), *size, *crop, 0.5)
    got, got_score = run("merge_masks", *arguments, True)
    assert torch.equal(got[same], labels[same])
    assert torch.equal(got_score[same], score[same])
    assert run("merge_masks", *arguments, False)[1].shape == (0,)


def test_merge_masks_shrinks_a_large_mask(run):
    """More of its rows lie under a tile than are kept at once."""
    masks, scores = normal(2, 90, 70), torch.tensor([0.5, 0.7])
    order, size, crop = torch.tensor([1, 0]), (40, 35), (350, 280)
    labels, score, same = clear(masks, scores, order, size, crop, 0.0)
    got, got_score = run("merge_masks", masks, scores, order, *size, *crop, 0.0, True)
    assert torch.equal(got[same], labels[same])
    assert torch.equal(got_score[same], score[same])


def test_merge_masks_tries_many(run):
    """Masks are looked at in groups; of the first group only one is there, and leaves something to the second."""
    masks, scores = normal(19, 8, 8), torch.linspace(1, 0, 19)
    masks[0, :, :4], masks[0, :, 4:], masks[1:8] = 1, -1, -1
    size = (32, 32)
    labels, score, same = clear(masks, scores, torch.arange(19), size, size, 0.0)
    assert len(labels.unique()) > 4
    got, got_score = run("merge_masks", masks, scores, torch.arange(19), *size, *size, 0.0, True)
    assert torch.equal(got[same], labels[same])
    assert torch.equal(got_score[same], score[same])


def test_merge_masks_passes_over_nan_and_masks_that_are_not_there(run):
    masks, scores = normal(3, 8, 8).abs() + 1, torch.tensor([0.9, 0.5, 0.1])
    masks[0, 2, 3], masks[0, 6, 6] = float("nan"), float("inf")
    want, _ = merge_masks.merge_masks(masks, scores, torch.tensor([0, 1, 2]), (32, 32), (32, 32), 0.0)
    assert want.unique().tolist() == [1, 2]
    got, _ = run("merge_masks", masks, scores, torch.tensor([0, 1, 2]), 32, 32, 32, 32, 0.0, False)
    assert torch.equal(got, want)
    got, _ = run("merge_masks", masks, scores, torch.tensor([7, -1, 1]), 32, 32, 32, 32, 0.0, False)
    assert (got == 2).all()
    nothing, _ = run(
        "merge_masks", masks[:0], scores[:0], torch.tensor([], dtype=torch.int64), 9, 40, 32, 32, 0.0, True
    )
    assert torch.equal(nothing, torch.zeros(9, 40, dtype=torch.int64))


@INPUTS
@pytest.mark.parametrize(
    ("batch", "count", "class_count", "channels", "length"),
    [
        (2, 100, 37, 24, 60),
        (1, 1100, 3, 40, 500),
        (2, 40, 1, 5, 11),
        (1, 3, 2, 300, 700),
        (1, 0, 3, 8, 5),
        (0, 4, 3, 8, 5),
    ],
)
def test_select_tokens(run, batch, count, class_count, channels, length, dtype, layout):
    assert_selects(run, (batch, count, class_count, channels, length), False, dtype, layout)


def test_select_tokens_with_presence_of_the_best(run):
    assert_selects(run, (1, 100, 37, 24, 60), True, torch.float32, "slice")


def assert_selects(run, shape: tuple[int, ...], best_only: bool, dtype: torch.dtype, layout: str) -> None:
    batch, count, class_count, channels, length = shape
    tokens, classes = (
        normal(batch, count, channels, dtype=dtype),
        normal(batch, class_count, channels, seed=1, dtype=dtype),
    )
    if count > 30:
        tokens[0, 3], tokens[0, 11] = 0, float("nan")
    want = select_tokens.select_tokens(tokens.double(), classes.double(), 0.1, length, best_only)
    given = [inside(x, layout) for x in (tokens, classes)]
    selected, counts, presence, *saved = run("select_tokens", *given, 0.1, length, best_only)
    assert torch.equal(selected.double(), want[0])
    assert torch.equal(counts, want[1])
    assert_near(presence, want[2], want[2].to(dtype))
    dselected, dpresence = normal(*selected.shape, seed=2, dtype=dtype), normal(*presence.shape, seed=3, dtype=dtype)
    # A token that is NaN survives no more than one that is 0, whose gradients by the reference are numbers.
    wide = [x.double().nan_to_num().requires_grad_() for x in (tokens, classes)]
    exact = [torch.zeros_like(x) for x in wide]
    if selected.numel():
        outputs = select_tokens.select_tokens(*wide, 0.1, length, best_only)
        exact = torch.autograd.grad((outputs[0], outputs[2]), wide, (dselected.double(), dpresence.double()))
    arguments = (inside(dselected, layout), inside(dpresence, layout), *given, *saved)
    for got, grad in zip(run("select_tokens_backward", *arguments), exact, strict=True):
        assert_near(got, grad, grad.to(dtype))


def test_select_tokens_ties_and_rows_of_zeros(run):
    classes = torch.eye(4)[None, [0, 1, 0]]
    tokens = torch.eye(4)[None, [0, 3, 1, 0]].clone()
    tokens[0, 1] = 0
    selected, counts, presence, support, best, above = run("select_tokens", tokens, classes, 0.0, 6, False)
    assert best.tolist() == [[0, 0, 1, 0]]  # equal cosines, and those of zeros, go to the lower class
    assert counts.tolist() == [[3, 1, 0]]
    assert selected[0].tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0], [0] * 6]
    assert above.tolist() == [[[7]] * 4]  # no cosine is below 0
    assert support.tolist() == [[4, 4, 4]]
    torch.testing.assert_close(presence, torch.tensor([[1 / 2, 1 / 4, 1 / 2]]))
    torch.testing.assert_close(run("select_tokens", tokens, classes, 0.0, 6, True)[2], torch.tensor([[2 / 3, 1, 0]]))


@INPUTS
@pytest.mark.parametrize(
    ("rows", "inputs", "hidden", "outputs"),
    [(5, 33, 40, 72), (3, 64, 128, 96), (1, 7, 5, 3), (0, 8, 8, 8), (40, 4, 9, 130)],
)
def test_prompt_mlp(run, rows, inputs, hidden, outputs, dtype, layout):
    shapes = ((rows, inputs), (6, inputs, hidden), (6, hidden), (6, hidden, outputs), (6, outputs))
    tensors = [normal(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]
    index = (torch.arange(rows) * 5 + 1) % 7 - 1  # −1: none; class 3 of fewer than 40 rows has none either
    given = [inside(x, layout) for x in tensors]
    y, kept = run("prompt_mlp", *given, inside(index, layout))
    wide = [x.double().requires_grad_() for x in tensors]
    want = prompt_mlp.prompt_mlp(*wide, index)
    assert_near(y, want, prompt_mlp.prompt_mlp(*tensors, index))
    assert (y[index < 0] == 0).all()
    z, w1, _, w2, _ = given
    dy = normal(rows, outputs, seed=9, dtype=dtype)
    arguments = (inside(dy, layout), z, w1, w2, inside(index, layout), kept)
    exact = torch.autograd.grad(want, wide, dy.double()) if rows else [torch.zeros_like(x) for x in wide]
    for got, grad in zip(run("prompt_mlp_backward", *arguments, True, True), exact, strict=True):
        assert_near(got, grad, grad.to(dtype))
    assert [g.shape == (0,) for g in run("prompt_mlp_backward", *arguments, False, True)] == [True, *[False] * 4]
    assert [g.shape == (0,) for g in run("prompt_mlp_backward", *arguments, True, False)] == [False, *[True] * 4]


def test_prompt_mlp_reads_no_class_that_is_not_there(run):
    z, w1, b1, w2, b2 = (normal(*shape) for shape in ((3, 8), (2, 8, 12), (2, 12), (2, 12, 20), (2, 20)))
    index = torch.tensor([2, -2, 1])
    y, hidden = run("prompt_mlp", z, w1, b1, w2, b2, index)
    assert y[:2].isnan().all()
    assert y[2].isfinite().all()
    dz, *dweights = run("prompt_mlp_backward", torch.ones(3, 20), z, w1, w2, index, hidden, True, True)
    assert dz[:2].isnan().all()
    assert all(grad.isfinite().all() for grad in dweights)


def test_launch_by_cupy(on_cpu, monkeypatch):
    """CuPy must get one text for NVRTC, torch's device and stream, and the parameters as one value."""

    class Entered:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            active.append(self.what)

        def __exit__(self, *_):
            active.pop()

    class RawModule:
        def __init__(self, code, options):
            assert "top_classes_f32" in code
            assert "#include" not in code

        def get_function(self, name):
            return lambda grid, block, arguments: self.launch(name, grid, block, *arguments)

        def launch(self, name, grid, block, params):
            assert isinstance(params, numpy.ndarray)
            assert params.size == 1
            assert active == [0, 77]
            on_cpu.launch("", name, grid, block[0], params.tobytes())

    active = []
    stand_in = SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(Device=Entered, ExternalStream=Entered))
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    nvrtc._module.cache_clear()
    on_cpu.set_order(0)
    assert LAUNCHERS["top_classes"](torch.tensor([[1.0, 3.0, 2.0, 3.0]]), 2)[1].tolist() == [[1, 3]]
    nvrtc._module.cache_clear()
