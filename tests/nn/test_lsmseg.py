"""Tests LSMSegHead: what it computes, that classes are interchangeable, how it trains, and where it must run."""

import copy

import pytest
import torch
from literal_lsmseg import SIZES, head, inputs, literal, plain
from torch import nn
from torch.nn import functional as F

from fastcss.nn import LSMSegHead
from fastcss.ops import filtered_argmax, pack_text


@pytest.mark.parametrize(("h", "w"), [(8, 4), (6, 9), (3, 5), (1, 1)])  # whole windows, filled ones, one, one pixel
@pytest.mark.parametrize("with_sam", [True, False])
def test_it_computes_the_equations(h, w, with_sam, device):
    module = (head(device) if with_sam else plain(device)[0]).double()
    image, text, sam, guidance = inputs(device, h=h, w=w)
    maps = [x.double().requires_grad_() for x in (image, text, *((sam, *guidance) if with_sam else ()))]
    arguments = (*maps[:3], maps[3:]) if with_sam else maps
    logits, expected = module(*arguments), literal(module, *arguments)
    torch.testing.assert_close(logits, expected)
    weights = torch.randn(expected.shape, dtype=torch.double, device=device)
    leaves = [*maps, *module.parameters()]
    got, want = (torch.autograd.grad((x * weights).sum(), leaves) for x in (logits, expected))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("k", [7, 50])
def test_as_many_as_there_are_is_no_filter(k, device):
    module, arguments = head(device, k=k), inputs(device)
    unfiltered = head(device, k=None)
    assert unfiltered.filtered(*arguments).index.tolist() == [list(range(7))] * 2
    assert module.filtered(*arguments).index.tolist() != [list(range(7))] * 2
    torch.testing.assert_close(module(*arguments), unfiltered(*arguments), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [4, None])
def test_the_classes_are_alike(k, device):
    module, (image, text, *rest) = head(device, k=k), inputs(device)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(3)).to(device)
    torch.testing.assert_close(
        module(image, text[order], *rest), module(image, text, *rest)[:, order], rtol=1e-4, atol=1e-5
    )


def test_kept_classes_and_labels(device):
    module, arguments = head(device), inputs(device)
    logits, filtered = module(*arguments), module.filtered(*arguments)
    assert logits.shape == (2, 7, 24, 36)
    for b in range(2):
        kept = set(filtered.index[b].tolist())
        assert len(kept) == 4
        for t in range(7):
            assert bool((logits[b, t] == -100).all()) == (t not in kept)
    labels = module.predict(*arguments)
    assert torch.equal(labels, logits.argmax(1))
    assert torch.equal(labels, filtered_argmax(filtered))
    assert not labels.requires_grad


def test_the_text_may_change_between_calls(device):
    module, (image, text, *rest) = head(device).eval(), inputs(device)
    for classes in (1, 3, 30):
        text = torch.randn(classes, 2, 12, device=device)
        assert module(image, text, *rest).shape == (2, classes, 24, 36)
    by_image = torch.randn(2, 7, 2, 12, device=device)
    own = [module(image[b : b + 1], by_image[b], rest[0][b : b + 1], [g[b : b + 1] for g in rest[1]]) for b in range(2)]
    torch.testing.assert_close(module(image, by_image, *rest), torch.cat(own), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(image, pack_text(text), *rest), module(image, text, *rest))


def test_other_stages_and_no_picture(device):
    module, (image, text) = plain(device, upsample_channels=(), layers=1)
    assert module(image, text).shape == (2, 7, 6, 9)
    module, _ = plain(device, upsample_channels=(48, 50, 4))  # groups of 16, one group of 50
    assert module(image, text).shape == (2, 7, 48, 72)
    assert module(image[:0], text).shape == (0, 7, 48, 72)
    assert module(image.to(memory_format=torch.channels_last), text).shape == (2, 7, 48, 72)


def test_the_loss_is_that_of_the_kept_classes(device):
    module, arguments = head(device), inputs(device)
    filtered = module.filtered(*arguments)
    labels = torch.randint(7, (2, 30, 50), generator=torch.Generator().manual_seed(2)).to(device)
    labels[:, :4] = 255
    logits = F.interpolate(filtered.cost, (30, 50), mode="bilinear")
    terms = []
    for b in range(2):
        for place, t in enumerate(filtered.index[b].tolist()):
            target = (labels[b] == t).float()
            terms.append(F.binary_cross_entropy_with_logits(logits[b, place], target, reduction="none")[4:])
    torch.testing.assert_close(module.loss(filtered, labels), torch.stack(terms).mean())
    for dtype in (torch.uint8, torch.int32):
        assert module.loss(filtered, labels.to(dtype)) == module.loss(filtered, labels)
    nothing = module.loss(filtered, torch.full_like(labels, -1), ignore_index=-1)
    nothing.backward()
    assert nothing == 0
    assert not any(p.grad.any() for p in module.parameters())


def test_it_has_the_gradient_of_all_classes(device):
    """Classes that were not kept are −100 whatever the weights: their pixels' large loss must have no gradient."""
    module, arguments = head(device), inputs(device)
    labels = torch.randint(7, (2, 24, 36), generator=torch.Generator().manual_seed(2)).to(device)
    everything = F.binary_cross_entropy_with_logits(module(*arguments), F.one_hot(labels, 7).movedim(3, 1).float())
    kept = module.loss(module.filtered(*arguments), labels)
    assert everything > 1 > kept
    got, want = (torch.autograd.grad(loss, list(module.parameters())) for loss in (kept * 4 / 7, everything))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_every_parameter_and_the_text_learn(device):
    module, (image, text, *rest) = head(device), inputs(device)
    text = text.requires_grad_()
    optimizer = torch.optim.Adam([*module.parameters(), text], 1e-2)
    labels = torch.randint(7, (2, 24, 36), generator=torch.Generator().manual_seed(2)).to(device)
    history = []
    for _ in range(20):
        loss = module.loss(module.filtered(image, text, *rest), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    for name, parameter in module.named_parameters():
        assert parameter.grad.any(), name
    assert text.grad.any()
    assert history[-1] < history[0]


def test_the_same_bits_from_run_to_run():
    """Two runs on a CPU must agree; on CUDA torch's convolutions and attention sum gradients in any order, unless told
    otherwise."""
    module, arguments = head(), inputs()
    runs = []
    for _ in range(2):
        module.zero_grad()
        logits = module(*arguments)
        logits.square().mean().backward()
        runs.append([logits, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_compiled_training_step(device):
    eager, arguments = head(device), inputs(device)
    module = copy.deepcopy(eager)
    labels = torch.randint(7, (2, 30, 50), generator=torch.Generator().manual_seed(2)).to(device)

    def loss(module, *arguments):
        return module.loss(module.filtered(*arguments), labels)

    got, want = torch.compile(loss, fullgraph=True, backend="aot_eager")(module, *arguments), loss(eager, *arguments)
    torch.testing.assert_close(got, want)
    for result in (got, want):
        result.backward()
    for a, b in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_compiled_forward(device):
    module, (image, text) = plain(device, layers=1, upsample_channels=())  # little C++ to compile
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(image, text), module(image, text))


def test_autocast(device):
    module, arguments = head(device, k=None), inputs(device)  # the choice of classes may differ from that in float32
    exact = module(*arguments)
    with torch.autocast(device, torch.bfloat16):
        filtered = module.filtered(*arguments)
        loss = module.loss(filtered, torch.zeros(2, 24, 36, dtype=torch.long, device=device))
    assert (filtered.cost.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(filtered.cost.float(), exact, rtol=0.1, atol=0.1)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in module.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_other_dtypes_agree_with_float64(dtype, tolerance, device):
    module, (image, text, sam, guidance) = head(device, k=None).double(), inputs(device)
    exact = module(image.double(), text.double(), sam.double(), [g.double() for g in guidance])
    got = copy.deepcopy(module).to(dtype)(
        image.to(dtype), text.to(dtype), sam.to(dtype), [g.to(dtype) for g in guidance]
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_weights_come_back_from_safetensors(tmp_path, device):
    from safetensors.torch import load_file, save_file

    module, arguments = head(device), inputs(device)
    save_file(module.state_dict(), tmp_path / "head.safetensors")
    other = LSMSegHead(12, **SIZES, upsample_channels=(8, 4)).to(device)
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other(*arguments), module(*arguments))


def test_the_default_is_cat_segs_size():
    module = LSMSegHead(512, guidance_channels=(256, 128))
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_children()}
    block = (
        4 * 128 + 2 * (256 * 128 + 128) + (128 * 128 + 128) + (2 * 4 * 128 * 128 + 5 * 128)
    )  # norms, q and k, v, mlp
    assert parts == {
        "category_filter": 0,
        "cost_embedding": 49 * 128 + 128,
        "visual_projection": 9 * 512 * 128 + 128,
        "text_projection": 512 * 128 + 128,
        "spatial": 2 * (2 * (block + 128 * 128 + 128) + 2 * 128),  # and the output projection; the guidance's norm
        "classes": 2 * block,
        "upsampling": (9 * 256 * 32 + 32) + (4 * 128 * 96 + 96) + 9 * (128 * 64 + 64 * 64) + 4 * 64
        + (9 * 128 * 16 + 16) + (4 * 64 * 48 + 48) + 9 * (64 * 32 + 32 * 32) + 4 * 32,
        "segmentation": 9 * 32 + 1,
    }  # fmt: skip
    assert LSMSegHead(4, sam_channels=3).fusion_weight == 0.5


def test_a_prediction_makes_no_logits_of_all_classes():
    """The logits of 1000 classes at 96×96 would take 35 MiB."""
    module, _ = plain()
    image, text = torch.randn(1, 12, 24, 24), torch.randn(1000, 2, 12)

    def largest_allocation(function):
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            function(image, text)
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest_allocation(module) >= 35 << 20
    assert largest_allocation(module.predict) < 8 << 20


def test_it_learns_digit_scenes(device):
    """Features and class vectors are random and stay so: only the head learns.

    The yardstick is the loss of an answer that knows how frequent each kept class is in these scenes, and no more.
    """
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    from fastcss.data import DigitScenes

    torch.manual_seed(0)
    images, labels = (torch.stack(part).to(device) for part in zip(*DigitScenes("train", 4), strict=True))
    labels = labels[:, 2::4, 2::4]
    clip = nn.Sequential(conv(3, 16), conv(16, 32), nn.Conv2d(32, 32, 3, 2, 1)).to(device)
    sam = nn.Sequential(conv(3, 16), nn.Conv2d(16, 32, 3, 2, 1)).to(device)
    text = F.normalize(torch.randn(11, 1, 32), dim=-1).to(device)
    with torch.no_grad():
        coarse, fine = clip(images * 2 - 1), sam(images * 2 - 1)  # strides 8 and 4
    arguments = (coarse, text, fine, [fine])
    sizes = {"k": 6, "hidden": 16, "layers": 1, "heads": 2, "window": 8, "upsample_channels": (16,)}
    module = LSMSegHead(32, sam_channels=32, guidance_channels=(32,), **sizes).to(device)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    history = []
    for _ in range(60):
        loss = module.loss(module.filtered(*arguments), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    with torch.no_grad():
        filtered = module.filtered(*arguments)
        shares = torch.bincount(labels.flatten(), minlength=11)[filtered.index] / labels.numel()
        yardstick = F.binary_cross_entropy(shares, shares)
        learnt = module.loss(filtered, labels)
    assert learnt < 0.6 * yardstick  # 0.42 as measured
    assert learnt < history[0] / 8  # 1/18 as measured


def conv(in_channels, out_channels):
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, 2, 1), nn.ReLU())
