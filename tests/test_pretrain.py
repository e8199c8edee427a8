"""Tests the small models' pre-training: each step learns, what is finished is kept, and a run can begin from its
end."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("sklearn")

from benchmarks import pretrain, small_models
from fastcss.models.continual import begin, train
from fastcss.models.continual_plan import DEFAULTS, Plan
from fastcss.models.decouplecss_folder import load, read_settings
from fastcss.models.decouplecss_training import Recipe
from fastcss.models.phrases import describe, encode, load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
GLYPHS = 12
STEPS = {"features": (24, 4), "detector": (12, 4), "points": (24, 2), "generator": (12, 2)}


@pytest.fixture(scope="module")
def small():
    """Sets few glyphs, scenes and steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_models, "GLYPHS", GLYPHS)
        patch.setattr(pretrain, "GLYPHS", GLYPHS)
        patch.setattr(pretrain, "SCENES", 12)
        patch.setattr(pretrain, "STEPS", STEPS)
        patch.setattr(pretrain, "RATES", dict.fromkeys(STEPS, 0.02))  # the usual rates do next to nothing in few steps
        yield patch


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """Makes the work folder and the run after all steps."""
    work, out = tmp_path_factory.mktemp("work"), tmp_path_factory.mktemp("out") / "base"
    pretrain._detector_chain(work, 0)
    pretrain._points_chain(work, 0)
    pretrain.finish(out, work, 0)
    return work, out


def test_every_step_learns(finished, small):
    """The loss on the scenes that it saw must be lower after the last step than before the first."""
    scenes = pretrain.Scenes(finished[0])
    for step, losses in (("features", pretrain.features), ("points", pretrain.points)):
        mean = {}
        for state in ("new", "trained"):
            torch.manual_seed(0)
            stream = losses(scenes, 8)
            modules = next(stream)
            if state == "trained":
                modules.load_state_dict(pretrain.load_file(finished[0] / f"{step}.safetensors"))
            torch.manual_seed(1)
            with torch.no_grad():
                mean[state] = sum(next(stream).item() for _ in range(3)) / 3
        assert mean["trained"] < 0.9 * mean["new"], step


def test_what_is_finished_is_read_and_not_done_again(finished, small):
    work, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert set(before) == {f"{name}.safetensors" for name in ("scenes", *STEPS)}
    small.setattr(pretrain, "Scenes", None)
    modules = pretrain.run("features", work, 0, pretrain.features)
    kept = pretrain.load_file(work / "features.safetensors")
    assert all(torch.equal(tensor, kept[name]) for name, tensor in modules.state_dict().items())
    assert {path.name: path.stat().st_mtime_ns for path in work.iterdir()} == before


def test_the_models_are_those_of_the_last_steps(finished):
    work, out = finished
    model = load(out)
    assert not model.tasks
    generator = pretrain.load_file(work / "generator.safetensors")
    for name, tensor in model.segmenter.state_dict().items():
        assert torch.equal(tensor, generator[f"sam.{name}"])
    for name, tensor in model.initial_generator.state_dict().items():
        assert torch.equal(tensor, generator[f"generator.{name}"])
    detector = pretrain.load_file(work / "detector.safetensors")
    name = "backbone.conv_encoder.model.encoder.stages.0.layers.0.pwconv1.weight"
    assert torch.equal(model.detector.get_parameter(name), detector[f"model.{name}"])


def test_the_digits_have_names_of_their_own(finished):
    model, tokenizer = load(finished[1]), load_tokenizer(finished[1] / "base/detector")
    words = encode(tokenizer, describe(small_models.CLASSES[1:]))
    embedded = model.detector.embed_phrases(words.input_ids, words.attention_mask)[:, 0]  # [10, D]
    apart = torch.cdist(embedded, embedded) + torch.eye(10) * 1e9
    assert apart.min() > 0.1 * embedded.norm(dim=1).mean()


def test_a_run_begins_from_it(finished, tmp_path):
    plan = DEFAULTS["digits"].plan | {"recipe": Recipe(epochs=1, batch_size=4), "train_scenes": 6, "test_scenes": 2}
    begin(tmp_path / "run", Plan("digits", "5-5", **plan), finished[1])
    assert read_settings(tmp_path / "run")["sites"] == "convnext+fusion"
    assert train(tmp_path / "run")["kind"] == "summary"
