"""Tests DecoupleCSS in 16 bits: the labels of float32, what stays in float32, and which dtypes are refused."""

from __future__ import annotations

import pytest
import torch
from decouplecss_models import agreement, build, pictures

pytest.importorskip("peft")
pytest.importorskip("sklearn")

from fastcss.commands._demo_measurement import scenes_of
from fastcss.commands.segment import KEPT
from fastcss.models.checkpoint import IN_FLOAT32
from fastcss.models.class_detector import ClassDetector
from fastcss.models.continual import load_run
from fastcss.models.decouplecss import MODES
from fastcss.models.decouplecss_folder import load, save_base, save_task
from fastcss.models.preprocessing import preprocess
from fastcss.models.sam import SamSegmenter

HALVES = (torch.bfloat16, torch.float16)
SCENES = 4


@pytest.fixture(scope="module")
def digits() -> tuple[dict, torch.Tensor]:
    """Prepares scenes for the kept model, and labels them in float32."""
    model, plan = load_run(KEPT)
    sizes = {"sam_side": model.segmenter.image_size, "shortest": plan.shortest, "longest": plan.longest}
    made = [preprocess(image, **sizes) for image, _ in scenes_of(plan, SCENES)]
    given = {name: torch.stack([getattr(of, name) for of in made]) for name in ("pixel_values", "sam_pixel_values")}
    given |= {"sizes": [of.size for of in made], "crops": [of.crop for of in made]}
    return given, torch.stack(model.segment(**given).labels)


@pytest.mark.parametrize(("dtype", "mode"), [(torch.float16, "one_pass"), *((torch.bfloat16, mode) for mode in MODES)])
def test_the_labels_are_those_of_float32(digits, dtype, mode):
    """Of 100 scenes at least 99.7% of the pixels have the same label in either dtype; no single scene is that sure."""
    given, expected = digits
    model, _ = load_run(KEPT, dtype=dtype)
    found = model.segment(**given, mode=mode)
    assert found.presence.dtype == dtype
    assert expected.unique().numel() > 5
    assert agreement([torch.stack(found.labels)], [expected]) >= 0.995


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_cast_and_what_stays(tmp_path, dtype):
    """Phrases must be read from disk: the text encoder has the weights that the run's features are of."""
    model = build((2, 1))
    model.segment(**pictures(1))
    save_base(model, tmp_path)
    for t in range(2):
        save_task(model, t, tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    calls = []
    loaded.detector.get_base_model().text_backbone.forward = lambda *_, **__: calls.append(1)
    loaded.segment(**pictures(1))
    assert not calls
    wide = set()
    for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()):
        if tensor.is_floating_point() and tensor.dtype != dtype:
            assert tensor.dtype == torch.float32
            wide |= IN_FLOAT32.intersection(name.split("."))
            assert wide, name
    assert wide == IN_FLOAT32


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_each_model_alone(tmp_path, dtype):
    SamSegmenter.random("tiny").model.save_pretrained(tmp_path)
    for sam in (SamSegmenter.random("tiny", dtype=dtype), SamSegmenter.from_folder(tmp_path, dtype=dtype)):
        exact = SamSegmenter.random("tiny")
        pixels, prompts = torch.randn(1, 3, 128, 128), torch.randn(3, 6, 32)
        masks, scores = sam.decode(sam.embed(pixels.to(dtype)), prompts)
        assert masks.dtype == scores.dtype == sam.dtype == dtype
        expected = exact.decode(exact.embed(pixels), prompts).masks
        assert (masks - expected).norm() <= 16 * torch.finfo(dtype).eps * expected.norm()
    detector = ClassDetector.random("tiny", dtype=dtype)
    ids = torch.randint(1000, 2000, (2, 5, 6))
    for encoder in (detector, ClassDetector.random("tiny")):
        phrases = encoder.embed_phrases(ids, torch.ones_like(ids))
        assert phrases.dtype == torch.float32
    given = pictures(1)["pixel_values"]
    found, expected = detector(given.to(dtype), phrases), ClassDetector.random("tiny")(given, phrases)
    for got, wanted in zip(found[:2], expected[:2], strict=True):
        assert got.dtype == dtype
        assert (got - wanted).norm() <= 16 * torch.finfo(dtype).eps * wanted.norm()


@torch.no_grad()
def test_a_mean_of_many_tokens_does_not_overflow(monkeypatch):
    """The sum over a large picture's tokens is beyond float16, and infinite tokens would be of no class, in silence."""
    detector = ClassDetector.random("tiny", dtype=torch.float16)
    embed = detector.embed_image

    def bright(*arguments):
        image = embed(*arguments)
        image.features += 2 * 65_504 / image.features.shape[1]
        return image

    monkeypatch.setattr(detector, "embed_image", bright)
    found = detector(pictures(1)["pixel_values"].half(), torch.randn(2, 5, 64))
    assert found.tokens.isfinite().all()
    assert found.classes.isfinite().all()


@pytest.mark.parametrize("make", [SamSegmenter.random, ClassDetector.random])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, "bfloat16"])
def test_other_dtypes_are_refused(make, dtype):
    with pytest.raises(ValueError, match=rf"{make.__self__.__name__}.random: dtype must be one of .*, got {dtype!r}"):
        make("tiny", dtype=dtype)
    with pytest.raises(ValueError, match="DecoupleCSS: dtype must be one of"):
        load("no such folder", dtype=dtype)
