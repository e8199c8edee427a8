"""Tests that the text encoder reads phrases once per model, and a run keeps them while the encoder is the same."""

from __future__ import annotations

import pytest
import torch
from decouplecss_models import build, pictures
from safetensors.torch import load_file, save_file

from fastcss.models.class_detector import ClassDetector
from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.decouplecss_folder import load, save_base, save_task
from fastcss.models.phrase_features import phrase_features


@pytest.fixture
def run(tmp_path):
    model = build((2, 1))
    model.segment(**pictures(1))  # which reads the phrases
    save_base(model, tmp_path / "run")
    for t in range(2):
        save_task(model, t, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def read(monkeypatch) -> list[int]:
    """Lists for each call of how many classes the text encoder read the phrases."""
    calls, embed = [], ClassDetector.embed_phrases

    def counted(self, input_ids, attention_mask):
        calls.append(len(input_ids))
        return embed(self, input_ids, attention_mask)

    monkeypatch.setattr(ClassDetector, "embed_phrases", counted)
    return calls


def features(model: DecoupleCSS) -> list[torch.Tensor]:
    return phrase_features(model.detector.get_base_model(), list(model.tasks))


def test_a_loaded_run_does_not_read_them_again(run, read):
    model = load(run)
    found = model.segment(**pictures(2))
    assert read == []
    expected = build((2, 1)).segment(**pictures(2))
    assert torch.equal(found.presence, expected.presence)
    assert all(map(torch.equal, found.labels, expected.labels))
    model.train().eval()  # packs anew
    model.segment(**pictures(2), mode="shared")
    assert read == [2, 1]  # by the model that was built here


def test_without_the_file_they_are_read_again(run, read):
    (run / "task_1/phrases.safetensors").unlink()
    model = load(run)
    features(model)
    assert read == [1]


def test_another_text_encoder_reads_them_again(run, read):
    model = load(run)
    before = features(model)
    with torch.no_grad():
        model.detector.get_base_model().text_projection.weight.mul_(2)
    after = features(model)
    assert read == [2, 1]
    assert not any(map(torch.equal, before, after))
    features(model)
    assert read == [2, 1]


def test_another_precision_reads_them_again(run, read):
    model = load(run).to(torch.bfloat16)
    assert [of.dtype for of in features(model)] == [torch.bfloat16] * 2
    assert read == [2, 1]


def test_other_phrases_are_read(run, read):
    model = load(run)
    before = features(model)
    model.tasks[0].input_ids[0, 0, 1] += 1
    after = features(model)
    assert read == [2]
    assert not torch.equal(before[0][0, 0], after[0][0, 0])
    assert torch.equal(before[0][1], after[0][1])


def test_a_file_that_is_not_whole_is_named(run):
    path = run / "task_0/phrases.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"task_0/phrases\.safetensors is no whole safetensors file"):
        load(run)
    path.write_bytes(whole)
    kept = load_file(path)
    save_file(kept | {"features": kept["features"][:1].clone()}, path)
    with pytest.raises(ValueError, match=r"phrases\.safetensors must hold digest \[32\] and features \[2, 5, D\]"):
        load(run)
