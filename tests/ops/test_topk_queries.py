"""topk_queries: every implementation × dtype × shape against the float64 reference."""

from __future__ import annotations

import math

import calls
import checks
import pytest
import torch
from calls import COMPILED, DTYPES, IMPLEMENTATIONS, LAYOUTS, Call, normal, runs
from left_out import light

from fastcss.ops import topk_queries


def make(batch, count, width, classes, k, *, bias=True, dtype=torch.float32, device="cpu", seed=0, **options) -> Call:
    """The k best scores are further apart than any dtype rounds them: 2% each, and all others below them.

    A token of the best is random but for its share of one prototype, which makes that logit the score wanted.
    """
    features, prototypes = normal(batch, count, width, seed=seed) / 4, normal(classes, width, seed=seed + 1)
    offset = normal(classes, seed=seed + 2) / 4 if bias else torch.zeros(classes)
    best = min(k + 1, count)
    logits = features @ prototypes.mT + offset
    # Twice what any other token has; and a prototype's share of one class is less of any other.
    wanted = 2 * max(logits.abs().amax().item() if logits.numel() else 1, 1) * torch.logspace(0, best - 1, best, 1.02)
    for b in range(batch):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + b))[:best]
        c = torch.arange(best) % classes
        missing = (wanted - logits[b, order, c]) / prototypes[c].square().sum(1)
        features[b, order] += missing[:, None] * prototypes[c]
    tensors = {"features": features, "prototypes": prototypes} | ({"bias": offset} if bias else {})
    return Call(topk_queries, {n: t.to(device, dtype) for n, t in tensors.items()}, {"k": k, **options})


CASES = {  # B, N, D, C, k
    "one element": (1, 1, 1, 1, 1),
    "no images": (0, 5, 4, 3, 2),
    "no tokens": (2, 0, 4, 3, 2),
    "one class": (2, 31, 33, 1, 5),
    "k 1": (2, 97, 33, 21, 1),
    "k = N": (3, 12, 33, 5, 12),
    "k > N": (1, 12, 33, 5, 40),
    "C 21": (2, 97, 65, 21, 30),
    "C 150": (1, 150, 150, 150, 20),
}
# Across the edges of a tiled kernel's blocks.
LARGE = {"N 1030": (2, 1030, 64, 150, 40), "D 260": (1, 300, 260, 33, 20), "N 5000": (1, 5000, 16, 5, 40)}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda case, dtype: case == "C 21" or (dtype == torch.float32 and case not in LARGE))
def test_values(impl, case, dtype, bias, device, tolerances):
    call = make(*(CASES | LARGE)[case], bias=bias, dtype=dtype, device=device)
    calls.assert_as_good_as_eager(call, impl, tolerances[dtype])
    found = call.outputs(impl)
    picked = call.tensors["features"].take_along_dim(found["index"][..., None], dim=1)
    assert torch.equal(found["queries"], picked)
    assert not any(y.requires_grad for y in call.leaves()(impl))


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_by_hand(impl, device):
    features = torch.tensor([[[1.0, 0.0], [0.0, 3.0], [-4.0, 1.0]]], device=device)
    prototypes = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], device=device)
    found = topk_queries(features, prototypes, 2, impl=impl)
    assert (found.index.tolist(), found.score.tolist()) == ([[2, 1]], [[4, 3]])
    bias = torch.tensor([5.0, 0.5, -4.0], device=device)
    found = topk_queries(features, prototypes, 2, bias, impl=impl)
    assert (found.index.tolist(), found.score.tolist()) == ([[0, 1]], [[7, 5]])
    assert found.queries.tolist() == [[[1, 0], [0, 3]]]


# --- ties, infinities, NaN -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_logits_that_are_all_negative(impl, device):
    """Padding of a block of classes must not count as a class whose logit 0 is the largest."""
    features, prototypes = -1 - normal(2, 30, 5).abs(), 1 + normal(7, 5, seed=1).abs()
    want = (features @ prototypes.mT).amax(2).sort(dim=1, descending=True).values[:, :4]
    found = topk_queries(features.to(device), prototypes.to(device), 4, impl=impl)
    torch.testing.assert_close(found.score.cpu(), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda dtype: dtype == torch.bfloat16)
def test_equal_scores_are_in_token_order(impl, dtype, device):
    """Whole numbers: the logits are exact in any dtype and any order of their sums."""
    features, prototypes = ((2 * normal(*s, seed=i)).round().clamp(-2, 2) for i, s in enumerate(((3, 90, 9), (7, 9))))
    score = (features @ prototypes.mT + 1).amax(2)
    assert score[0].unique().numel() < 60
    arguments = (t.to(device, dtype) for t in (features, prototypes, torch.ones(7)))
    features, prototypes, bias = arguments
    for k in (1, 13, 90):
        found = topk_queries(features, prototypes, k, bias, impl=impl)
        want = [sorted(range(90), key=lambda n, row=row: -row[n])[:k] for row in score.tolist()]
        assert found.index.tolist() == want
        assert torch.equal(found.score.float().cpu(), score.gather(1, torch.tensor(want)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, under Triton's interpreter
@pytest.mark.parametrize("where", ["features", "prototypes", "bias"])
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_nan_is_above_all(impl, where, device):
    call = make(2, 70, 9, 5, 4, device=device)
    before = call.outputs(impl)["index"]
    if where == "features":
        call.tensors["features"][1, (31, 8), 4] = math.nan
        others = [n for n in before[1].tolist() if n not in (8, 31)][:2]
        assert call.outputs(impl)["index"].tolist() == [before[0].tolist(), [8, 31, *others]]
    else:
        call.tensors[where][2] = math.nan
        assert call.outputs(impl)["index"].tolist() == [[0, 1, 2, 3]] * 2
        assert call.outputs(impl)["score"].isnan().all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_classes_switched_off(impl, device):
    """A bias of −∞ takes a class out; all of them leave the tokens in their order."""
    call = make(2, 70, 9, 5, 4, device=device)
    call.tensors["bias"][[1, 3]] = -math.inf
    kept = torch.tensor([0, 2, 4], device=device)
    want = call.having(**{n: call.tensors[n][kept] for n in ("prototypes", "bias")}).outputs(impl)
    got = call.outputs(impl)
    assert torch.equal(got["index"], want["index"])
    torch.testing.assert_close(got["score"], want["score"])
    call.tensors["bias"][:] = -math.inf
    assert call.outputs(impl)["index"].tolist() == [[0, 1, 2, 3]] * 2


# --- strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda layout: layout in ("NCHW", "a slice", "expanded batch"))
def test_any_strides(impl, layout, device, tolerances):
    """Prototypes may be one row repeated, tokens may not: they would be ties."""
    call = make(2, 66, 18, 5, 9, bias=layout != "expanded rows", device=device)
    changed = {"features": call.tensors["features"]} if layout == "expanded rows" else dict(call.tensors)
    changed.pop("prototypes") if layout == "expanded batch" else None
    change = LAYOUTS["a slice"] if layout == "expanded rows" else LAYOUTS[layout]
    call = call.having(**{name: calls.laid_out(t, change) for name, t in changed.items()})
    calls.assert_as_good_as_eager(call, impl, tolerances[torch.float32])


# --- the same again, torch.library, torch.compile, torch.vmap --------------------------------------------------------


@pytest.mark.parametrize("impl", COMPILED)
def test_reproducible_and_of_its_image_alone(impl, device):
    call = make(3, 70, 33, 21, 9, dtype=torch.bfloat16, device=device)
    checks.assert_reproducible(call, impl)
    checks.assert_batch_invariant(call, impl, shared=("prototypes", "bias"))


@pytest.mark.parametrize("case", ["C 21", *LARGE])
def test_threads_do_not_change_results(case):
    runs("cpu", "cpu")
    for dtype in DTYPES:
        checks.assert_same_on_any_number_of_threads(make(*(CASES | LARGE)[case], dtype=dtype))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast(impl, device):
    checks.assert_autocasts(make(2, 40, 18, 5, 9, device=device), impl, device)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_compile_without_graph_breaks(impl, device):
    checks.assert_compiles(make(2, 20, 9, 5, 4, device=device), impl)


@pytest.mark.parametrize("mapped", [("features", "prototypes", "bias"), ("features",), ("prototypes",)], ids=" ".join)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda mapped: len(mapped) > 1)
def test_vmap(impl, mapped, device):
    call = make(2, 12, 9, 3, 4, device=device)
    checks.assert_maps(call, impl, mapped)


@pytest.mark.parametrize("impl", COMPILED)
def test_opcheck(impl, device):
    for shape in ((2, 20, 9, 5, 4), (0, 5, 4, 3, 2), (1, 1, 1, 1, 1)):
        features, prototypes, bias = make(*shape, device=device).tensors.values()
        for given in (bias, None):
            checks.opcheck("topk_queries", impl, features, prototypes, given, shape[-1])
