"""Tests which classes of a picture are present: by r of eq. A.2, or by the best class's tokens alone in older runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from decouplecss_models import add_task, assert_alike, build, phrases, pictures
from training_scenes import pictures_for

import fastcss
from fastcss.models.continual import load_run
from fastcss.models.decouplecss import MODES, DecoupleCSS
from fastcss.models.decouplecss_folder import load, read_settings, save_base, save_task
from fastcss.models.decouplecss_training import activate, embed_phrases, training_step
from fastcss.models.task_pictures import TaskPictures, collate
from fastcss.ops import select_tokens

KEPT = Path(fastcss.__file__).with_name("assets") / "digits"


def with_twins() -> DecoupleCSS:
    """Build a task between two others whose classes are twins: a token near to one is as near to the other."""
    model = build((1,))
    add_task(model, 2)
    for buffer in (model.tasks[1].input_ids, model.tasks[1].attention_mask):
        buffer[1] = buffer[0]
    add_task(model, 1)
    for task in model.tasks:
        task.thresholds.fill_(0.06)
    return model


@pytest.mark.parametrize("mode", MODES)
def test_a_class_whose_tokens_are_all_nearer_to_another_is_found(mode, monkeypatch):
    """A class whose tokens are all nearer to another must still be prompted for, by its L_k alone."""
    model, given, prompts = with_twins(), pictures(1), []
    decode = model.segmenter.decode
    monkeypatch.setattr(
        model.segmenter,
        "decode",
        lambda image, prompt, **counts: (prompts.append(prompt), decode(image, prompt, **counts))[1],
    )
    found = model.segment(**given, mode=mode)
    assert found.present[0, 1:3].all()
    torch.testing.assert_close(found.presence[0, 2], found.presence[0, 1])
    by_embedding = model.tasks[1].generator(torch.zeros(1, model.length), torch.tensor([1]))[0]
    assert (
        sum(torch.allclose(prompt, by_embedding, atol=1e-6) for prompt in torch.cat([p for p in prompts if len(p)]))
        == 1
    )
    model.presence = "best"
    before = model.segment(**given, mode=mode)
    assert before.present[0, 1]
    assert before.presence[0, 2] == 0
    assert not before.present[0, 2]


def test_modes_agree_on_classes_without_tokens():
    model, given = with_twins(), pictures(3)
    literal = model.segment(**given, mode="literal")
    assert literal.present[:, 2].any()
    for mode in MODES:
        assert_alike(model.segment(**given, mode=mode), literal)


def test_a_class_that_no_token_reaches_is_not_there_before_calibration():
    model = with_twins()
    model.threshold = 0.999
    for task in model.tasks:
        task.thresholds.zero_()
    for mode in MODES:
        assert not model.segment(**pictures(1), mode=mode).present.any()


def test_what_another_class_has_won_teaches_all_the_same():
    """A twin that is best for no token must get the gradient of eq. A.3, the same as the other twin."""
    model = with_twins()
    task = model.tasks[1]
    activate(model, task)
    features = embed_phrases(model, task).detach().requires_grad_()
    examples = pictures_for(model, 2)
    batch = collate([examples[i] for i in range(2)])
    batch.present[:] = True
    training_step(model, task, features, batch).presence.backward()
    torch.testing.assert_close(features.grad[1].sum(0), features.grad[0].sum(0), rtol=1e-3, atol=1e-7)
    assert features.grad[1].any()


def test_a_run_keeps_its_form_and_one_from_before_the_key_has_the_old(tmp_path):
    model, given = with_twins(), pictures(1)
    save_base(model, tmp_path / "run")
    for t in range(3):
        save_task(model, t, tmp_path / "run")
    assert read_settings(tmp_path / "run")["presence"] == load(tmp_path / "run").presence == "all"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    del config["settings"]["presence"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    old = load(tmp_path / "run")
    assert read_settings(tmp_path / "run")["presence"] == old.presence == "best"
    model.presence = "best"
    assert_alike(old.segment(**given), model.segment(**given))
    save_task(old, 2, tmp_path / "run", overwrite=True)  # it is gone on with
    old.presence = "all"
    with pytest.raises(ValueError, match=r"'presence': 'best'.*the model has.*'presence': 'all'"):
        save_task(old, 2, tmp_path / "run", overwrite=True)


@torch.no_grad()
def test_the_kept_model_finds_what_it_was_calibrated_to():
    """A model's thresholds must belong to the form it was trained with; those of the old form are worked out by
    hand."""
    model, plan = load_run(KEPT)
    if model.presence != "best":
        pytest.skip("the kept model was trained with eq. A.2")
    scenes = TaskPictures(plan.test_data(), range(1, 11), model.segmenter, plan.shortest, plan.longest)
    for i in range(3):
        scene, expected = scenes[i], []
        for task in model.tasks:
            model.detector.set_adapter(task.name)
            features = model.detector.get_base_model().embed_phrases(task.input_ids, task.attention_mask)
            tokens, classes, _ = model.detector(scene.pixel_values[None], phrases=features)
            sizes = {"threshold": model.threshold, "length": model.length}
            found = select_tokens(tokens, classes, **sizes, presence="best", impl="reference")
            expected.append((found.counts > 0) & (found.presence >= task.thresholds))
        got = model.segment(scene.pixel_values[None], scene.sam_pixel_values[None], [(128, 128)])
        assert torch.equal(got.present, torch.cat(expected, 1))


def test_phrases_of_twins_are_alike():
    """The tests above rely on this."""
    model = with_twins()
    first, second = embed_phrases(model, model.tasks[1])
    torch.testing.assert_close(first, second)
    assert not torch.equal(phrases(2, 1).input_ids[0], phrases(2, 1).input_ids[1])
