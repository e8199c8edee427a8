"""Tests ClassAwareAffinity: how it trains, where it must run, and what it refuses."""

import copy

import pytest
import torch
from caa_heads import head, picture
from torch import nn
from torch.nn import functional as F

from fastcss.nn import ClassAwareAffinity


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_other_dtypes_agree_with_float64(dtype, tolerance, device):
    module, (features, labels) = head(device=device).eval().double(), picture(device)
    exact, output = module(features.double()), copy.deepcopy(module).to(dtype)(features.to(dtype))
    for got, want in zip(output, exact, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)
    for got, want in zip(module.loss(output, labels), module.loss(exact, labels), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("h", "w", "height", "width"), [(5, 7, 20, 28), (5, 7, 5, 7), (5, 7, 38, 50), (1, 1, 3, 9)])
def test_the_losses_are_those_of_the_equations(h, w, height, width, device):
    module, (features, _) = head(device=device, loss_weights=(0.5, 2.0, 0.25)).eval(), picture(device, h=h, w=w)
    labels = torch.randint(5, (2, height, width), generator=torch.Generator().manual_seed(2)).to(device)
    labels[0, 0] = 255
    output = module(features)
    losses = module.loss(output, labels)

    def cross_entropy(logits):
        return F.cross_entropy(F.interpolate(logits, (height, width), mode="bilinear"), labels, ignore_index=255)

    torch.testing.assert_close(losses.seg, cross_entropy(output.logits))
    torch.testing.assert_close(losses.aux, cross_entropy(output.coarse))
    small = F.interpolate(labels[:, None].double(), (h, w), mode="nearest").flatten(1)
    same = (small[:, :, None] == small[:, None, :]).float()
    counts = (small != 255)[:, :, None] & (small != 255)[:, None, :]
    pairs = F.binary_cross_entropy_with_logits(output.q @ output.k.mT, same, reduction="none")
    torch.testing.assert_close(losses.affinity, pairs[counts].mean())
    torch.testing.assert_close(losses.total, 0.5 * losses.seg + 2 * losses.affinity + 0.25 * losses.aux)
    for dtype in (torch.uint8, torch.int32):
        assert module.loss(output, labels.to(dtype)).total == losses.total


def test_nothing_to_learn_from_is_zero_with_zero_gradients(device):
    module, (features, labels) = head(device=device, ignore_index=-1), picture(device)
    losses = module.loss(module(features.requires_grad_()), torch.full_like(labels, -1))
    assert not any(losses)
    losses.total.backward()
    assert not features.grad.any()
    for parameter in module.parameters():
        assert not parameter.grad.any()


def test_every_parameter_learns(device):
    module, (features, labels) = head(device=device), picture(device)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    history = []
    for _ in range(30):
        losses = module.loss(module(features), labels)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        history.append(torch.stack(losses).detach())
    for name, parameter in module.named_parameters():
        assert parameter.grad.any(), name
    assert torch.all(history[-1] < history[0]), dict(zip(losses._fields, history[-1] - history[0], strict=True))


@pytest.mark.parametrize("strides", ["channels_last", "expanded", "sliced"])
def test_any_strides(strides, device):
    module, (features, _) = head(device=device).eval(), picture(device)
    if strides == "channels_last":
        other = features.to(memory_format=torch.channels_last)
    elif strides == "expanded":
        features = features[:1].expand(2, -1, -1, -1).contiguous()
        other = features[:1].expand(2, -1, -1, -1)
    else:
        other = features.mT.repeat(1, 2, 1, 2)[:, :12, :, :5].mT
    for got, want in zip(module(other), module(features), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_one_pixel_one_class_and_no_picture(device):
    module = head(device=device, classes=1).eval()
    output = module(torch.randn(1, 12, 1, 1, device=device))
    assert module.loss(output, torch.zeros(1, 8, 8, dtype=torch.long, device=device)).total.isfinite()
    assert module(torch.randn(0, 12, 4, 4, device=device)).logits.shape == (0, 1, 4, 4)


def test_autocast(device):
    module, (features, labels) = head(device=device).eval(), picture(device)
    exact = module(features)
    with torch.autocast(device, torch.bfloat16):
        output = module(features.requires_grad_())
        losses = module.loss(output, labels)
    assert (output.logits.dtype, output.q.dtype, losses.total.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    torch.testing.assert_close(output.logits.float(), exact.logits, rtol=0.05, atol=0.05)
    losses.total.backward()
    assert features.grad.isfinite().all()
    assert features.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_forward_and_training_step(backend, device):
    eager, (features, labels) = head(device=device), picture(device)
    module = copy.deepcopy(eager)

    def losses(module, features, labels):
        return module.loss(module(features), labels)

    compiled = torch.compile(losses, fullgraph=True, backend=backend)
    got, want = compiled(module, features, labels), losses(eager, features, labels)
    torch.testing.assert_close(got, want)
    for result in (got, want):
        result.total.backward()
    for a, b in zip(module.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tuple(module.buffers()), tuple(eager.buffers()))  # the statistics moved alike
    module.eval()
    forward = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(tuple(forward(features)), tuple(eager.eval()(features)))


def test_distributed_data_parallel(tmp_path, device):
    eager, (features, labels) = head(device=device), picture(device)
    module = copy.deepcopy(eager)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(module)
        for _ in range(2):  # the second pass finds out whether every parameter was used in the first
            for m, forward in ((module, parallel), (eager, eager)):
                m.zero_grad()
                m.loss(forward(features), labels).total.backward()
        torch.testing.assert_close([p.grad for p in module.parameters()], [p.grad for p in eager.parameters()])
    finally:
        torch.distributed.destroy_process_group()


def test_other_normalisations(device):
    module = nn.SyncBatchNorm.convert_sync_batchnorm(head())
    norms = [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    assert [type(layer) for layer in norms] == [nn.SyncBatchNorm] * 11
    module = head(device=device, norm_layer=lambda channels: nn.GroupNorm(2, channels))
    assert module(picture(device)[0]).logits.shape == (2, 5, 5, 7)


def test_weights_come_back_from_safetensors(tmp_path, device):
    from safetensors.torch import load_file, save_file

    module, (features, _) = head(device=device).eval(), picture(device)
    save_file(module.state_dict(), tmp_path / "head.safetensors")
    other = ClassAwareAffinity(12, 5, key_channels=6, attention_channels=8).to(device).eval()
    other.load_state_dict(load_file(tmp_path / "head.safetensors"))
    assert torch.equal(other(features).logits, module(features).logits)


def test_the_affinity_map_is_never_made():
    """One N×N map of N = 2304 pixels takes 20 MiB, and the reference makes it; everything else here is small."""
    features, labels = picture(batch=1, h=48, w=48, stride=1)

    def largest_allocation(impl):
        module = head(impl=impl)
        module.loss(module(features), labels).total.backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            module.loss(module(features), labels).total.backward()
        return max(event.self_cpu_memory_usage for event in profile.events())

    assert largest_allocation("reference") >= 20 << 20
    assert largest_allocation("auto") < 9 << 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"key_channels": -3}, "key_channels must be at least 1, got -3"),
        ({"attention_channels": 0}, "attention_channels must be at least 1"),
        ({"impl": "fast"}, "impl must be 'auto' or one of reference, .*, got 'fast'"),
        ({"loss_weights": (1, 1)}, "loss_weights must be three numbers"),
        ({"context": "class"}, "context must be one of full, centers, affinity, intra, inter, got 'class'"),
        ({"context": "affinity", "ocr_bottleneck": True}, "ocr_bottleneck must be False without class centres"),
    ],
)
def test_bad_sizes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassAwareAffinity(**{"in_channels": 4, "num_classes": 3} | arguments)


def test_bad_features_are_named():
    module = head()
    for shape in ((2, 11, 5, 7), (12, 5, 7), (2, 12, 0, 7)):
        with pytest.raises(ValueError, match=r"features must be \[B, (D|12), h, w\].*, got \["):
            module(torch.randn(shape))
    with pytest.raises(TypeError, match=r"features must be a floating-point tensor, got torch.int64"):
        module(torch.ones(2, 12, 5, 7, dtype=torch.int64))
    with pytest.raises(TypeError, match="features must be a tensor"):
        module([1.0])


def test_an_explicit_implementation_never_falls_back():
    module = head(impl="cpu").double()
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run"):
        module(picture()[0].double())


def test_bad_labels_are_named():
    module, (features, labels) = head(), picture()
    output = module(features)
    for wrong in (labels[:1], labels[0], labels[:, None]):
        with pytest.raises(ValueError, match=r"labels must be \[B, H, W\]"):
            module.loss(output, wrong)
    for wrong in (labels[:, :4], labels[:, :, :6], labels.mT, labels[:, :14]):
        with pytest.raises(ValueError, match=r"labels must be .* whose features are 5×7, .* got \d+×\d+"):
            module.loss(output, wrong)
    for wrong in (labels.float(), labels.bool()):
        with pytest.raises(TypeError, match=r"labels must be a tensor of integers, got torch\.(float32|bool)"):
            module.loss(output, wrong)
    with pytest.raises(TypeError, match="labels must be a tensor"):
        module.loss(output, labels.tolist())
    for value, got in ((5, "0 to 5"), (-1, "-1 to 4")):
        wrong = labels.clone()
        wrong[1, 9, 9] = value
        with pytest.raises(IndexError, match=f"num_classes − 1 = 4, or ignore_index = 255; got values from {got}"):
            module.loss(output, wrong)
