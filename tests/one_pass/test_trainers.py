"""Tests a runner in others' training loops: transformers' Trainer, accelerate, DistributedDataParallel."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
import warnings
from pathlib import Path

import distributed_training
import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from adapted_models import EXACT, adapt, loop
from torch import nn

import fastcss

TASKS = ["task0", "task1", "task2"]


def classifier(**options) -> peft.PeftModel:
    """Build a ViT with three tasks, each with a head of its own, as Hugging Face's recipe has it."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8,
        num_labels=5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    sites = {"r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], **options}
    return adapt(transformers.ViTForImageClassification(config), sites, sites, sites)


class Pictures(torch.utils.data.Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, i):
        return {"pixel_values": torch.full((3, 32, 32), i / 10), "labels": torch.tensor(i % 5)}


def batch(*places: int) -> dict:
    items = [Pictures()[i] for i in places]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


# --- the switch -------------------------------------------------------------------------------------------------------


def training(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"trainable_token_indices": [1, 2]}])
def test_one_switch_for_all_adapters(options):
    """What it lets train is what PEFT trains of each adapter, were it the active one."""
    if "trainable_token_indices" in options:
        config = transformers.CLIPTextConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        sites = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"token_embedding": [1, 2]}}
        model = adapt(transformers.CLIPTextModel(config), sites, sites, sites)
    else:
        model = classifier(**options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DoRA runs in turn
        runner = fastcss.one_pass(model)
    of_each = {}
    for name in TASKS:
        model.set_adapter(name)
        of_each[name] = training(model)
    assert len(set.union(*of_each.values())) == sum(map(len, of_each.values())) > 6
    runner.set_requires_grad()
    assert training(model) == set.union(*of_each.values())
    runner.set_requires_grad("task1", requires_grad=False)
    assert training(model) == of_each["task0"] | of_each["task2"]
    runner.set_requires_grad(TASKS, requires_grad=False)
    assert training(model) == set()
    runner.set_requires_grad(["task1"])
    assert training(model) == of_each["task1"]
    with pytest.raises(KeyError, match="no adapter 'task9'"):
        runner.set_requires_grad(["task0", "task9"])
    assert training(model) == of_each["task1"]


def test_adapters_of_folders_do_not_train(tmp_path):
    model = classifier()
    model.save_pretrained(tmp_path)
    runner = fastcss.one_pass.from_directories(model.unload(), [tmp_path / "task0"])
    with pytest.raises(TypeError, match=r"task0 were read from folders and are no parameters.*load them by PEFT"):
        runner.set_requires_grad()


# --- transformers' Trainer --------------------------------------------------------------------------------------------


class SumOfTasks(transformers.Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss.sum(), outputs) if return_outputs else outputs.loss.sum()


def trainer_of(model: peft.PeftModel, folder: Path) -> SumOfTasks:
    runner = fastcss.one_pass(model, task_dim=1)
    runner.set_requires_grad()
    return SumOfTasks(runner, arguments(folder), train_dataset=Pictures())


def arguments(folder: Path) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=5, num_train_epochs=2, save_steps=2, save_strategy="steps",
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
    )  # fmt: skip


def test_trainer_trains_all_adapters_at_once_and_resumes(tmp_path):
    """Each adapter becomes what PEFT's own Trainer makes of it alone, also through a checkpoint."""
    model, alone = classifier(), classifier()
    trainer = trainer_of(model, tmp_path / "all")
    trainer.train()
    alone.set_adapter("task1")
    transformers.Trainer(alone, arguments(tmp_path / "alone"), train_dataset=Pictures()).train()
    before, wanted, got = classifier().state_dict(), alone.state_dict(), model.state_dict()
    of_task = [name for name in wanted if ".task1." in name]
    assert len(of_task) == 10
    for name in of_task:
        assert (wanted[name] - before[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=0)

    resumed = classifier()
    again = trainer_of(resumed, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "all" / "checkpoint-2"))
    for name, value in resumed.state_dict().items():
        torch.testing.assert_close(value, got[name], atol=EXACT, rtol=0)
    found = again.predict(Pictures())
    assert found.predictions.shape == (10, 3, 5)
    assert found.label_ids.tolist() == [i % 5 for i in range(10)]
    with torch.no_grad():
        outputs = loop(resumed.eval(), batch(*range(10)))
    expected = torch.stack([output.logits for output in outputs], 1)
    torch.testing.assert_close(torch.from_numpy(found.predictions), expected, atol=EXACT, rtol=0)
    assert found.metrics["test_loss"] == pytest.approx(float(sum(output.loss for output in outputs)), abs=1e-4)


def test_the_signature_is_the_models():
    """Trainer reads it: columns of a data set that it lacks are dropped, and so are labels."""
    runner = fastcss.one_pass(classifier())
    names = list(inspect.signature(runner.forward).parameters)
    assert names[:2] == ["pixel_values", "labels"]
    assert names[-4:] == ["adapters", "route", "per_sample", "per_adapter"]
    assert transformers.utils.generic.find_labels(type(runner)) == ["labels"]
    assert isinstance(runner, fastcss.one_pass)
    assert type(copy.deepcopy(runner)).__name__ == "OnePass"
    runner.model.get_base_model().forward = lambda anything, adapters=None: runner
    runner.refresh()
    assert list(inspect.signature(runner.forward).parameters)[:2] == ["anything", "adapters"]


# --- accelerate and DistributedDataParallel ---------------------------------------------------------------------------


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, places: list[tuple[int, ...]], backward) -> None:
    for few in places:
        optimizer.zero_grad()
        backward(model(**batch(*few)).loss.sum())
        optimizer.step()


def test_accelerate():
    model, other = classifier(), classifier()
    runners = [fastcss.one_pass(m, task_dim=1) for m in (model, other)]
    optimizers = []
    for runner in runners:
        runner.set_requires_grad()
        optimizers.append(torch.optim.SGD([p for p in runner.parameters() if p.requires_grad], 0.1))
    steps(runners[1], optimizers[1], [(0, 1, 2), (3, 4, 5)], torch.Tensor.backward)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(runners[0], optimizers[0])
    steps(prepared, optimizer, [(0, 1, 2), (3, 4, 5)], accelerator.backward)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)
    loader = accelerator.prepare(torch.utils.data.DataLoader(Pictures(), batch_size=4))
    with torch.no_grad():
        found = torch.cat([accelerator.gather_for_metrics(prepared(**few).logits) for few in loader])
    assert found.shape == (10, 3, 5)
    assert accelerator.unwrap_model(prepared) is runners[0]


def test_distributed_data_parallel_is_one_process_on_the_whole_batch(tmp_path):
    """All adapters train, so ``find_unused_parameters`` is not wanted."""
    store, script = str(tmp_path / "store"), distributed_training.__file__
    environment = {**os.environ, "PYTHONPATH": str(Path(script).parents[2])}
    with subprocess.Popen([sys.executable, "-W", "ignore", script, "1", store], env=environment) as other:
        got = distributed_training.train(0, store).state_dict()
        assert other.wait(120) == 0
    model = distributed_training.model()
    before = copy.deepcopy(model.state_dict())
    distributed_training.take_steps(model, [[0, 1, 2, 3], [4, 5, 6, 7]])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(got[name], value, atol=EXACT, rtol=0)
        assert torch.equal(value, before[name]) != any(f".{task}." in name for task in TASKS), name
