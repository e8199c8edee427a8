"""Tests the prompt generator that new classes begin from: copied bit for bit, unchanged, kept in the run's folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from continual_runs import StopAt, plan_of
from decouplecss_models import phrases
from killed_process import killing
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_scenes import pictures_for

from fastcss.models.class_detector import ClassDetector
from fastcss.models.continual import begin, train
from fastcss.models.continual_plan import DEFAULTS
from fastcss.models.decouplecss import DecoupleCSS
from fastcss.models.decouplecss_folder import load, read_settings, read_training, save_base, save_task
from fastcss.models.decouplecss_training import Recipe, TaskTrainer
from fastcss.models.phrases import load_tokenizer
from fastcss.models.prompt_generator import PromptGenerator
from fastcss.models.sam import SamSegmenter

SIZES = {"length": 64, "prompts": 2, "hidden": 16}
PLACE = "base/generator/generator.safetensors"


def initial(classes: int = 1, prompt_dim: int = 32, **sizes: int) -> PromptGenerator:
    """Build a generator that looks trained: untrained biases are zeros."""
    torch.manual_seed(7)
    generator = PromptGenerator(classes, prompt_dim=prompt_dim, **SIZES | sizes)
    for parameter in generator.parameters():
        nn.init.normal_(parameter, std=0.3)
    return generator


def build(generator: PromptGenerator | None = None, **settings) -> DecoupleCSS:
    settings = {"threshold": 0.05, "rank": 2, "alpha": 2} | SIZES | settings
    detector, segmenter = ClassDetector.random("tiny"), SamSegmenter.random("tiny")
    return DecoupleCSS(detector, segmenter, **settings, initial_generator=generator).eval()


def weights(generator: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in generator.state_dict().items()}


def assert_copies(generator: PromptGenerator, start: dict[str, Tensor], atol: float = 0) -> None:
    """Check that every class of ``generator`` is ``start``."""
    assert weights(generator).keys() == start.keys()
    for name, value in weights(generator).items():
        torch.testing.assert_close(value, start[name].expand_as(value), rtol=0, atol=atol)


# ---- in a model


def test_every_new_class_begins_as_a_copy():
    start, model = weights(initial()), build(initial())
    assert model.classes == ()
    tasks = [model.add_task([f"{count} {k}" for k in range(count)], phrases(count)) for count in (3, 1)]
    for task, count in zip(tasks, (3, 1), strict=True):
        assert task.generator.sizes == {"classes": count, "prompt_dim": 32, **SIZES}
        assert_copies(task.generator, start)
    assert all(parameter.requires_grad for parameter in tasks[1].generator.parameters())
    assert not any(parameter.requires_grad for parameter in model.initial_generator.parameters())
    assert len(model.tasks) == 2
    assert model.double().initial_generator.weight_1.dtype == torch.float64


def test_without_it_classes_begin_at_random():
    model = build()
    weight = model.add_task(["one", "two"], phrases(2)).generator.weight_1
    assert model.initial_generator is None
    assert not torch.equal(weight[0], weight[1])


def test_training_changes_the_copies_and_not_the_initial_one():
    start, model = weights(initial()), build(initial())
    task = model.add_task(["red", "blue"], phrases(2))
    TaskTrainer(model, task, pictures_for(model, 4), Recipe(epochs=1, batch_size=2, learning_rate=1e-3)).run_epoch()
    learned = weights(task.generator)
    for name, value in learned.items():
        assert all((of_class != start[name][0]).any() for of_class in value), name
        assert not torch.equal(value[0], value[1]), name
    assert_copies(model.initial_generator, start)
    assert_copies(model.add_task(["green"], phrases(1)).generator, start)
    assert all(torch.equal(value, learned[name]) for name, value in weights(task.generator).items())


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"classes": 2}, {}, "must have classes 1, got classes 2"),
        ({"prompt_dim": 16}, {}, "must have prompt_dim 32, got prompt_dim 16"),
        ({"prompts": 3}, {}, "must have prompts 2, got prompts 3"),
        ({}, {"length": 128, "hidden": 8}, "must have length 128, hidden 8, got length 64, hidden 16"),
    ],
)
def test_a_misfit_is_named(given, settings, message):
    generator = initial(**given)
    with pytest.raises(ValueError, match=f"^DecoupleCSS: initial_generator {message}$"):
        build(generator, **settings)
    assert all(parameter.requires_grad for parameter in generator.parameters())


# ---- in a folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """Makes a run with an initial generator and a task; tests must not change it."""
    folder, model = tmp_path_factory.mktemp("kept") / "run", build(initial())
    task = model.add_task(["one", "two"], phrases(2))
    with torch.no_grad():
        task.generator.bias_1.add_(1)
    save_base(model, folder)
    save_task(model, 0, folder)
    return folder


def test_a_run_keeps_it(kept):
    assert json.loads((kept / "config.json").read_text())["generator"] == {"folder": "base/generator"}
    state = torch.get_rng_state()
    model = load(kept)
    assert torch.equal(torch.get_rng_state(), state)
    assert_copies(model.initial_generator, weights(initial()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.tasks[0].generator.bias_1, initial().bias_1.repeat(2, 1) + 1)
    assert_copies(model.add_task(["three"], phrases(1)).generator, weights(initial()))


def test_in_its_dtype(tmp_path):
    save_base(build(initial()).bfloat16(), tmp_path)
    got = load(tmp_path).initial_generator.weight_1
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, initial().weight_1.bfloat16())


def test_a_run_that_names_its_models_keeps_it_too(kept, tmp_path):
    save_base(build(initial()), tmp_path, detector=kept / "base/detector", segmenter=kept / "base/segmenter")
    assert [path.name for path in (tmp_path / "base").iterdir()] == ["generator"]
    assert_copies(load(tmp_path).initial_generator, weights(initial()))


def test_a_run_from_before_there_were_any_still_loads(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    assert config.pop("generator") is None
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    model = load(tmp_path / "run")
    assert model.initial_generator is None
    assert len(model.tasks) == 3


def test_what_is_not_whole_is_named(kept, tmp_path):
    run = Path(shutil.copytree(kept, tmp_path / "run"))
    tensors = load_file(run / PLACE)
    save_file(tensors | {"weight_1": tensors["weight_1"][:, :60].clone()}, run / PLACE)
    with pytest.raises(ValueError, match=rf"{PLACE} is of another .*: weight_1 is \[1, 60, 16\], wanted \[1, 64, 16\]"):
        load(run)
    (run / PLACE).write_bytes(b"half")
    with pytest.raises(ValueError, match=f"{PLACE} is no whole safetensors file"):
        load(run)
    (run / PLACE).unlink()
    with pytest.raises(FileNotFoundError, match=f"{PLACE} is missing"):
        load(run)
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"generator": "base/generator"}))
    with pytest.raises(ValueError, match=r"^DecoupleCSS: .*config\.json: "):
        load(run)


def save_until_killed(model: DecoupleCSS, kept: Path, folder: Path, calls: int) -> None:
    """Save in a process of its own, which kills itself at the given call of those that touch the disk."""
    dying = killing(calls)
    for name in ("mkdir", "fsync", "rename", "replace"):
        setattr(os, name, dying(getattr(os, name)))
    save_base(model, folder, detector=kept / "base/detector", segmenter=kept / "base/segmenter")


def test_a_killed_beginning_is_no_run_or_a_whole_one(kept, tmp_path):
    model, whole, code = load(kept), [], None
    while code != 0:
        run = tmp_path / str(len(whole))
        arguments = model, kept, run, len(whole)
        child = multiprocessing.get_context("fork").Process(target=save_until_killed, args=arguments)
        child.start()
        child.join()
        code = child.exitcode
        assert code in (0, -signal.SIGKILL)
        whole.append((run / "config.json").exists())
        if not whole[-1]:
            with pytest.raises(FileNotFoundError, match=r"no such folder|is no run"):
                load(run)
            save_base(model, run, detector=kept / "base/detector", segmenter=kept / "base/segmenter")
        assert_copies(load(run).initial_generator, weights(initial()))
    assert whole == sorted(whole)
    assert whole.count(False) > 6


# ---- in a run that learns


@pytest.fixture(scope="module")
def base(digit_models, tmp_path_factory) -> Path:
    """Makes a run without tasks but with an initial generator, which a new run takes over."""
    folder = tmp_path_factory.mktemp("base") / "run"
    save_base(build(initial(), sites="fusion"), folder, tokenizer=load_tokenizer(digit_models / "base/detector"))
    return folder


def test_a_run_takes_it_over_from_its_base_and_learns_from_it(base, tmp_path):
    """The learning rate is next to nothing, so what a task ends with is what it began with, also when interrupted."""
    run, still = tmp_path / "run", Recipe(epochs=1, batch_size=4, learning_rate=1e-12)
    begin(run, plan_of(recipe=still, train_scenes=4, test_scenes=1), base, settings={"rank": 2})
    defaults = DEFAULTS["digits"].settings
    assert defaults["length"] != SIZES["length"]
    assert read_settings(run) == defaults | SIZES | {"sites": "fusion", "rank": 2}
    assert read_training(run)["train_scenes"] == 4
    assert (run / PLACE).read_bytes() == (base / PLACE).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        train(run, watch=StopAt("measured"))
    train(run)
    for task in load(run).tasks:
        assert len(task.classes) == 5
        assert_copies(task.generator, weights(initial()), atol=1e-10)


def test_settings_that_it_contradicts_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=f"hidden must be 16, as the initial generator of {base} has it, got 64"):
        begin(tmp_path / "run", plan_of(), base, settings={"hidden": 64})
    with pytest.raises(ValueError, match=r"sites 'convnext\+fusion' has no place"):
        begin(tmp_path / "run", plan_of(), base, settings={"sites": "convnext+fusion"})
    assert not (tmp_path / "run").exists()
    begin(tmp_path / "run", plan_of(), base, settings={"hidden": 16, "sites": "swin+fusion"})
    assert read_settings(tmp_path / "run")["sites"] == "swin+fusion"
