"""Tests learning task after task: what is learned, by every method."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch
from continual_runs import RECIPE, SETTINGS, StopAt, learned, lines, plan_of
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import fastcss
from fastcss.data import CLASS_NAMES, DigitScenes, Overlapped, training_set
from fastcss.models.continual import begin, load_run, read_plan, share_last_adapter, train
from fastcss.models.continual_evaluation import evaluate
from fastcss.models.decouplecss_calibration import calibrate
from fastcss.models.decouplecss_folder import load, read_settings
from fastcss.models.decouplecss_training import Losses, Recipe, TaskTrainer
from fastcss.models.phrases import describe, encode, load_tokenizer
from fastcss.models.task_pictures import TaskPictures


def adapters(model) -> list[dict[str, torch.Tensor]]:
    return [
        get_peft_model_state_dict(model.detector, adapter_name=task.name, save_embedding_layers=False)
        for task in model.tasks
    ]


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def iou_now(run) -> list[float | None]:
    """Measure the IoU of every label by the run's model as loaded; None if it has none, or is not learned yet."""
    model, plan = load_run(run)
    seen = [label for labels in plan.tasks[: len(model.tasks)] for label in labels]
    iou = evaluate(model, Overlapped(plan.test_data(), seen), plan.labels, plan.shortest, plan.longest).tolist()
    return [None if math.isnan(value) or label not in (0, *seen) else value for label, value in enumerate(iou)]


# ---- what a run holds


def test_a_run_is_its_tasks_and_its_lines(digit_run):
    run = digit_run("decouplecss")
    assert {path.name for path in run.iterdir()} == {"config.json", "base", "task_0", "task_1", "metrics.jsonl"}
    first, second, summary = lines(run)
    names = ["zero", "one", "two", "three", "four"], ["five", "six", "seven", "eight", "nine"]
    assert (first["kind"], first["task"], first["classes"]) == ("task", 1, names[0])
    assert (second["kind"], second["task"], second["classes"]) == ("task", 2, names[1])
    assert load_run(run)[0].classes == tuple(names[0] + names[1])
    for line in (first, second):
        assert line["loss"].keys() == set(Losses._fields)
        assert all(math.isfinite(loss) for loss in line["loss"].values())
    about = {"method": "decouplecss", "setting": "5-5", "data": "digits", "seed": 0}
    about |= {"train_split": "train", "train_pictures": 8}
    assert {name: summary[name] for name in about} == about
    assert summary["kind"] == "summary"
    assert summary["all"] == second["all"]
    assert summary["first"] == second["old"]


@pytest.mark.parametrize("method", ["decouplecss", "naive", "joint"])
def test_the_last_line_is_what_the_loaded_model_measures(digit_run, method):
    *_, last, _ = lines(digit_run(method))
    assert iou_now(digit_run(method)) == last["iou"]
    assert sum(value is not None for value in last["iou"]) > 5


def test_every_task_learns_on_its_own(digit_run, digit_models, tmp_path):
    """Its adapter and generators differ from how they began, and later tasks leave its bits alone."""
    plan = plan_of()
    begin(tmp_path / "run", plan, digit_models, settings=SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", watch=StopAt("measured"))
    assert learned(tmp_path / "run") == {
        name: content for name, content in learned(digit_run("decouplecss")).items() if name.startswith("task_0")
    }
    assert iou_now(tmp_path / "run") == lines(tmp_path / "run")[0]["iou"]
    first, second = adapters(load(digit_run("decouplecss")))
    assert not equal(first, second)
    for adapter in (first, second):
        assert all((x != 0).any() for name, x in adapter.items() if "lora_B" in name)


@pytest.mark.parametrize(("t", "labels", "scenes"), [(0, range(1, 6), 6), (1, range(6, 11), 8)])
def test_a_task_is_learned_as_by_hand(digit_run, tmp_path, t, labels, scenes):
    run, later = digit_run("decouplecss"), ("task_0", "task_1")[t:]
    model = load(shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns(*later)))
    names = [CLASS_NAMES["digits"][label] for label in labels]
    torch.manual_seed(t)
    task = model.add_task(names, encode(load_tokenizer(run / "base/detector"), describe(names)))
    fastcss.fuse(model.detector)
    seen = training_set(DigitScenes("train", 8), labels)
    assert len(seen) == scenes
    pictures = TaskPictures(seen, labels, model.segmenter, 64, 64)
    trainer = TaskTrainer(model, task, pictures, dataclasses.replace(RECIPE, seed=t))
    losses = [trainer.run_epoch() for _ in range(RECIPE.epochs)][-1]
    calibrate(model, task, pictures, RECIPE.batch_size)
    kept = load(run)
    assert equal(task.state_dict(), kept.tasks[t].state_dict())
    assert equal(adapters(model)[t], adapters(kept)[t])
    assert lines(run)[t]["loss"] == {name: loss.item() for name, loss in losses._asdict().items()}


def test_the_same_again_and_another_seed(digit_run, digit_models, tmp_path):
    for seed in (0, 1):
        run = tmp_path / str(seed)
        torch.manual_seed(seed + 10)  # the global generator does not matter
        before = torch.get_rng_state()
        begin(run, plan_of(method="joint", seed=seed), digit_models, settings=SETTINGS)
        train(run)
        assert torch.equal(torch.get_rng_state(), before)
        assert (learned(run) == learned(digit_run("joint"))) == (seed == 0)
        assert (lines(run) == lines(digit_run("joint"))) == (seed == 0)


def test_own_phrases_are_what_is_learned_by(digit_models, tmp_path):
    plan = plan_of(method="joint", recipe=dataclasses.replace(RECIPE, epochs=1))
    own = {name: [f"round {name}", f"{name} small"] for name in plan.labels[1:]}
    begin(tmp_path / "run", dataclasses.replace(plan, phrases=own), digit_models, settings=SETTINGS)
    train(tmp_path / "run")
    (task,) = load(tmp_path / "run").tasks
    assert task.input_ids.shape == (10, 3, 4)  # the name and two phrases; [CLS], two words, [SEP]
    assert read_plan(tmp_path / "run").phrases == own


def test_models_may_be_named_by_their_folders(digit_models, digit_run, tmp_path):
    run, folders = tmp_path / "run", (digit_models / "base/detector", digit_models / "base/segmenter")
    begin(tmp_path / "other", plan_of(), folders, settings=SETTINGS)
    assert read_settings(tmp_path / "other")["sites"] == "fusion"
    begin(run, plan_of(), folders, settings=SETTINGS | {"sites": "swin+fusion"})
    train(run)
    assert not (run / "base").exists()
    assert learned(run) == learned(digit_run("decouplecss"))
    assert read_settings(run) == read_settings(digit_run("decouplecss"))


def test_images_of_a_task_weigh_its_iou(digit_run):
    """Last-IoU is weighted by how many test pictures show a class of each task: eq. 8 and 9."""
    plan = plan_of()
    weights = [len(training_set(plan.test_data(), labels)) for labels in plan.tasks]
    *_, last, summary = lines(digit_run("decouplecss"))
    means = []
    for labels in plan.tasks:
        values = [last["iou"][label] for label in labels if last["iou"][label] is not None]
        means.append(sum(values) / len(values))
    expected = sum(w * mean for w, mean in zip(weights, means, strict=True)) / sum(weights)
    assert summary["last_iou"] == pytest.approx(expected)


# ---- the methods


def test_joint_is_one_task_of_all_classes(digit_run):
    model, plan = load_run(digit_run("joint"))
    assert [task.classes for task in model.tasks] == [plan.labels[1:]]
    (line, summary) = lines(digit_run("joint"))
    assert line["classes"] == list(plan.labels[1:])
    assert summary["ff_iou"] is None


def test_naive_has_one_adapter_the_last(digit_run):
    as_learned, now = load(digit_run("naive")), load_run(digit_run("naive"))[0]
    first, last = adapters(as_learned)
    assert not equal(first, last)
    assert all(equal(adapter, last) for adapter in adapters(now))
    for before, after in zip(as_learned.tasks, now.tasks, strict=True):
        assert equal(before.state_dict(), after.state_dict())
    assert (
        lines(digit_run("naive"))[0]["iou"] == lines(digit_run("decouplecss"))[0]["iou"]
    )  # the first task is the same
    assert lines(digit_run("naive"))[1]["iou"] != lines(digit_run("decouplecss"))[1]["iou"]


def test_naive_goes_on_from_the_adapter_before(digit_models, tmp_path):
    """The learning rate is next to nothing, so what a task ends with is what it began with."""
    still = Recipe(epochs=1, batch_size=8, learning_rate=1e-12)
    found = {}
    for method in ("naive", "decouplecss"):
        begin(
            tmp_path / method,
            plan_of(method=method, recipe=still, train_scenes=4, test_scenes=1),
            digit_models,
            settings=SETTINGS,
        )
        train(tmp_path / method)
        first, second = (load_file(tmp_path / method / f"task_{t}/adapter_model.safetensors") for t in range(2))
        found[method] = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert found["naive"] < 1e-9
    assert found["decouplecss"] > 1e-2


def test_sharing_shows_at_once_in_what_is_segmented(digit_run):
    model = load(digit_run("naive"))
    plan = read_plan(digit_run("naive"))
    given = model, plan.test_data(), plan.labels, plan.shortest, plan.longest
    before = evaluate(*given)
    share_last_adapter(model)
    after = evaluate(*given)
    assert not torch.equal(before.nan_to_num(), after.nan_to_num())
    torch.testing.assert_close(after, evaluate(*given, mode="literal"), atol=1e-3, rtol=0, equal_nan=True)
