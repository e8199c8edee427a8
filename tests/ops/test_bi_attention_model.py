"""bi_attention beside transformers' own module, and where its logits are further apart than that counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from bi_inputs import ABOVE, EACH_MASK, FAR, MASKS, make_far, rounded_once, some
from calls import DTYPES, IMPLEMENTATIONS, NOT_OF_64_BITS, assert_as_good_as_eager, normal
from left_out import light
from torch import Tensor

from fastcss.ops import bi_attention

# --- what others compute ---------------------------------------------------------------------------------------------


def in_its_module(features: dict[str, Tensor], masks: dict[str, Tensor], heads: int, width: int):
    """transformers' own module; its output, and that with ``bi_attention`` between its linear layers, by impl."""
    grounding_dino = pytest.importorskip("transformers.models.grounding_dino.modeling_grounding_dino")
    torch.manual_seed(0)
    image = features["image"]
    config = grounding_dino.GroundingDinoConfig(
        d_model=image.shape[2], encoder_ffn_dim=2 * heads * width, encoder_attention_heads=2 * heads
    )
    module = grounding_dino.GroundingDinoBiMultiHeadAttention(config).to(image.device, image.dtype).eval()

    def theirs() -> tuple[Tensor, Tensor]:
        found = module(features["image"], features["text"], masks.get("image_mask"), masks.get("text_mask"))
        return found[0][0], found[1][0]

    def ours(impl: str) -> tuple[Tensor, Tensor]:
        q, v_image = (f(features["image"]) for f in (module.vision_proj, module.values_vision_proj))
        k, v_text = (f(features["text"]) for f in (module.text_proj, module.values_text_proj))
        split = (tensor.unflatten(2, (heads, width)) for tensor in (q, k, v_image, v_text))
        image, text = bi_attention(*split, **masks, impl=impl)
        return module.out_vision_proj(image), module.out_text_proj(text)

    return module, theirs, ours


@EACH_MASK
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda masks: masks == MASKS)
@NOT_OF_64_BITS
def test_in_place_of_transformers_own(impl, dtype, masks, device):
    """Both outputs and all inputs' gradients must be those of transformers' module, between its linear layers."""
    features = {n: 3 * normal(2, t, 24, seed=t, dtype=dtype, device=device) for n, t in (("image", 19), ("text", 9))}
    features = {name: tensor.requires_grad_() for name, tensor in features.items()}
    unread = {n: some(2, 9 if n == "text_mask" else 19).to(device) for n in masks}
    module, theirs, ours = in_its_module(features, unread, 3, 8)
    douts = [normal(2, tokens, 24, seed=1, dtype=dtype, device=device) for tokens in (19, 9)]
    leaves = [*features.values(), *module.parameters()]
    found = [[*map(Tensor.detach, y), *torch.autograd.grad(y, leaves, douts)] for y in (ours(impl), theirs())]
    for got, want in zip(*found, strict=True):
        size = max(torch.linalg.vector_norm(want), 1e-3)  # a bias that shifts all logits alike has no gradient
        assert torch.linalg.vector_norm(got - want) <= (1e-5 if dtype == torch.float32 else 1e-13) * size


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("masks", [(), MASKS], ids=["all read", "masks"])
@pytest.mark.parametrize("case", FAR)
@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
@light(lambda masks: masks == MASKS)
@NOT_OF_64_BITS
def test_its_clamps_are_transformers_own(impl, case, masks, dtype, device):
    """Half of the features' channels are projected as they are to queries and keys, the others at random to values."""
    call = make_far(case, masks=masks, dtype=dtype, device=device)
    sides = {"image": ("q", "v_image"), "text": ("k", "v_text")}
    features = {n: torch.cat([call.tensors[name].flatten(2) for name in side], 2) for n, side in sides.items()}
    module, theirs, ours = in_its_module(features, call.options, 2, 16)
    with torch.no_grad():
        eye = torch.eye(32, dtype=dtype, device=device)
        for linear in (module.vision_proj, module.text_proj):
            linear.weight.copy_(torch.cat([eye, 0 * eye], dim=1))
            linear.bias.zero_()
        for linear in (module.values_vision_proj, module.values_text_proj):
            linear.weight[:, :32] = 0
        for got, want in zip(ours(impl), theirs(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["reference", "composed"])
def test_its_clamps_at_random_weights(impl, device):
    """Weights are 1,000 times their usual size; float64's rounding decides nothing."""
    features = {
        n: normal(2, t, 24, seed=t, dtype=torch.float64, device=device) for n, t in (("image", 37), ("text", 9))
    }
    module, theirs, ours = in_its_module(features, {}, 3, 8)
    with torch.no_grad():
        for linear in (module.vision_proj, module.text_proj):
            linear.weight.mul_(1000)
        q, k = module.vision_proj(features["image"]), module.text_proj(features["text"])
        logits = torch.einsum("bnhd,blhd->bhnl", q.unflatten(2, (3, 8)), k.unflatten(2, (3, 8))) / 8**0.5
        floored = logits - logits.max() < -50000
        assert floored.any()
        assert floored.all(dim=3).any()
        for got, want in zip(ours(impl), theirs(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


# --- further apart than the model counts -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", FAR)
def test_what_the_floor_does_in_the_reference(case):
    """That these inputs floor what they say, and that it shows in the sides that they say."""
    call = make_far(case, masks=(), dtype=torch.float64)
    q, k, v_image, v_text = (tensor.transpose(1, 2) for tensor in call.tensors.values())
    logits = q @ k.mT / 4
    below = logits - logits.max()
    assert (below == below.float()).all()
    assert ((below + 50000).abs() > 0.4).all()
    assert (below < -50000).any() == (case != "nothing")
    assert (below < -ABOVE + 2).any()
    without = (logits.softmax(3) @ v_text, logits.mT.softmax(3) @ v_image)
    image, text = (
        (got.unflatten(2, (2, 16)) - want.transpose(1, 2)).abs().amax(dim=(2, 3)) > 1e-2
        for got, want in zip(call("reference"), without, strict=True)
    )  # [B, N], [B, L]: where the floor has changed anything
    rows = [i % 3 == 1 for i in range(11)]
    wanted = {
        "nothing": ([[False] * 11] * 2, [[False] * 6] * 2),
        "some entries of a row": ([rows] * 2, [[False] * 6] * 2),
        "a whole row": ([rows] * 2, [[False] * 6] * 2),
        "some entries of a column": ([[False] * 11] * 2, [[j == 2 for j in range(6)]] * 2),
        "a whole column": ([[False] * 11] * 2, [[j == 2 for j in range(6)]] * 2),
        "some of another sample": ([[False] * 11, [True] * 11], [[False] * 6, [True] * 6]),
        "all of another sample": ([[False] * 11, [True] * 11], [[False] * 6, [True] * 6]),
        "all but one": ([[i != 4 for i in range(11)], [True] * 11], [[j != 1 for j in range(6)], [True] * 6]),
    }
    assert (image.tolist(), text.tolist()) == wanted[case]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masks", [(), MASKS], ids=["all read", "masks"])
@pytest.mark.parametrize("case", FAR)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@light(lambda masks, dtype: dtype == torch.float32 and masks == MASKS)
def test_further_apart_than_the_model_counts(impl, case, masks, dtype, device, tolerances):
    """Exact in 32 bits, so compared with that also in 16."""
    call = dataclasses.replace(make_far(case, masks=masks, dtype=dtype, device=device), op=rounded_once)
    assert_as_good_as_eager(call, impl, tolerances[dtype])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_masked_logits_are_a_peak_too(impl, device, tolerances):
    """The peak must include masked logits, as in the model, whose masks come after its floor."""
    for name, token in (("text_mask", 1), ("image_mask", 4)):
        call = make_far("all but one", masks=(name,), device=device)
        call.options[name][:] = False
        call.options[name][0, token] = True
        assert_as_good_as_eager(dataclasses.replace(call, op=rounded_once), impl, tolerances[torch.float32])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_gradient_through_the_floor(impl, device):
    call = make_far("all of another sample", device=device)
    got = call.leaves().results(impl, call.output_gradients())
    assert not got["dq"][1].count_nonzero()
    assert not got["dk"][1].count_nonzero()
    for name in ("dq", "dk"):
        assert got[name][0].count_nonzero()
    for name in ("dv_image", "dv_text"):
        assert got[name].count_nonzero(dim=(1, 2, 3)).all()


@pytest.mark.parametrize("impl", ["reference", *IMPLEMENTATIONS])
def test_floored_text_is_read_alike(impl, device):
    """The mean of what is not masked."""
    call = make_far("all of another sample", device=device)
    image, text = call(impl)
    for side, value, mask in ((image, "v_text", "text_mask"), (text, "v_image", "image_mask")):
        mean = call.tensors[value][1][~call.options[mask][1]].mean(dim=0).flatten()
        torch.testing.assert_close(side[1], mean.expand_as(side[1]))
