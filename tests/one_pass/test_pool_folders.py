"""Tests a pool's folders: those that change or vanish while it runs, are damaged, or hold what no pool takes."""

from __future__ import annotations

import copy
import os
import shutil
import threading

import peft
import pytest
import torch
from adapted_models import edit_config
from pool_models import arena
from safetensors.torch import load_file, save_file

import fastcss
from fastcss._one_pass.adapter_pool import AdapterPool


@torch.no_grad()
def test_a_folder_that_changes_is_refused_by_name_and_the_others_go_on(copied):
    pool, route = copied.pool(), ["task0", None, "task1", "task1"]
    before = pool(**copied.given, route=route)
    weights = copied.folders[1] / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"adapter 'task1'.*task1 has changed.*pool.refresh\('task1'\)"):
            pool(**copied.given, route=route)
        assert torch.equal(pool(**copied.given, route=["task0"] * 4)[0], before[0])
    pool.refresh("task1")
    got = pool(**copied.given, route=route)
    assert torch.equal(got[0], before[0])
    assert not torch.equal(got[2:], before[2:])
    # A scale is in the other file.
    edit_config(copied.folders[0], lora_alpha=70)
    with pytest.raises(RuntimeError, match="adapter 'task0'"):
        pool(**copied.given, route=route)
    pool.refresh("task0")
    assert (pool(**copied.given, route=route)[0] - before[0]).abs().max() > 1e-3
    shutil.rmtree(copied.folders[0])
    with pytest.raises(FileNotFoundError, match=r"adapter 'task0'.*task0.*is gone"):
        pool(**copied.given, route=route)
    assert torch.equal(pool(**copied.given, route=[None, None, "task1", "task1"])[2:], got[2:])
    with pytest.raises(FileNotFoundError, match=r"task0.*adapter_config.json is missing"):
        pool.refresh("task0")
    pool.prefetch(["task0", "task2"])
    pool._ahead.submit(lambda: None).result()
    assert pool.resident[-1] == "task2"


@torch.no_grad()
def test_a_file_that_changes_while_it_is_read_is_not_kept(copied, monkeypatch):
    from fastcss._one_pass import pool_arena

    pool, put = copied.pool(), pool_arena.put

    def touched(*arguments):
        put(*arguments)
        os.utime(copied.folders[2] / "adapter_model.safetensors", (1, 1))

    monkeypatch.setattr(pool_arena, "put", touched)
    with pytest.raises(RuntimeError, match=r"'task2'.*has changed"):
        pool(**copied.given, route=["task2", "task2", None, None])
    monkeypatch.undo()
    assert "task2" not in pool.resident
    assert not arena(pool)._holders[threading.get_ident()]
    copied.check(pool(**copied.given, route=["task0", "task4", None, None]), ["task0", "task4", None, None])


@torch.no_grad()
def test_another_adapter_in_a_folder_begins_the_pool_anew(copied):
    pool = copied.pool()
    pool(**copied.given, route=["task0"] * 4)
    shutil.rmtree(copied.folders[0])
    shutil.copytree(copied.folders[3], copied.folders[0])  # of other layers and rank
    pool.refresh("task0")
    assert pool.resident == ()
    copied.check(pool(**copied.given, route=["task0"] * 4), ["task3"] * 4)


def of_other_kinds():
    linear = {"r": 2, "target_modules": ["query"]}
    return {
        "use_dora": ({**linear, "use_dora": True}, TypeError, "uses use_dora; a pool holds plain LoRA"),
        "a bias of B": ({**linear, "lora_bias": True}, TypeError, "uses lora_bias"),
        "modules": ({**linear, "modules_to_save": ["value"]}, TypeError, "uses modules_to_save"),
        "pissa": ({**linear, "init_lora_weights": "pissa"}, TypeError, "initialised by pissa"),
    }


@pytest.mark.parametrize("kind", of_other_kinds())
def test_other_kinds_are_refused_at_once(kept, tmp_path, kind):
    options, error, message = of_other_kinds()[kind]
    model = peft.get_peft_model(copy.deepcopy(kept.bare), peft.LoraConfig(**options))
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(error, match=rf"AdapterPool: .*other.*{message}"):
        AdapterPool(kept.bare, [*kept.folders, tmp_path / "other"], budget=1 << 20)


@pytest.mark.parametrize("damage", ["cut", "no header", "beside", "elsewhere", "pickle", "another model"])
def test_damaged_folders_are_refused_at_once(copied, damage):
    folder = copied.folders[4]
    weights = folder / "adapter_model.safetensors"
    held = load_file(weights)
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif damage == "no header":
        weights.write_bytes(b"\xff" * 64)
    elif damage == "beside":
        save_file({**held, "base_model.model.value.weight": torch.zeros(7, 6)}, weights)
    elif damage == "elsewhere":
        save_file({key.replace("head", "tail"): value for key, value in held.items()}, weights)
    elif damage == "pickle":
        weights.rename(folder / "adapter_model.bin")
    else:
        save_file({key: value.repeat(2, 2) if "A" in key and value.dim() == 2 else value
                   for key, value in held.items()}, weights)  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=r"AdapterPool: .*task4"):
        copied.pool()


@torch.no_grad()
def test_halves_are_read_as_peft_reads_them(copied):
    """PEFT's adapters run in float32, whatever they were copied in."""
    for folder in copied.folders:
        weights = folder / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(weights).items()}, weights)
    route = ["task0", "task2", "task4", None]
    want = fastcss.one_pass.from_directories(copied.bare, copied.folders)(**copied.given, route=route)
    assert torch.equal(copied.pool()(**copied.given, route=route), want)
