"""Saves DecoupleCSS in a folder and loads it: safetensors and JSON, with a folder for each task.

::

    config.json          the architecture, and where the frozen models' weights are
    base/detector, base/segmenter    those weights as transformers saves them, if they come from no other folder
    base/generator       generator.safetensors: the initial prompt generator of a new class, if one was given
    task_0/ task_1/ …    adapter_config.json, adapter_model.safetensors: a PEFT adapter
                         task.json: name, classes, phrases; task.safetensors: prompt generators, thresholds
                         phrases.safetensors: the text encoder's features of the phrases, if it has read them
    metrics.jsonl        a line for each thing that was measured
"""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    GroundingDinoConfig,
    GroundingDinoModel,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SamConfig,
    SamModel,
)

from .._files import read_tensors, standing_folder, whole_file, whole_folder
from .._one_pass.read_saved import CONFIG_FILE, WEIGHTS_FILE
from .checkpoint import cast, check_dtype, check_tensors, empty, load_pretrained, save_pretrained
from .class_detector import ClassDetector
from .decouplecss import DecoupleCSS
from .grounding_dino import LORA_SITES, PARTS
from .phrase_features import load_phrase_features, save_phrase_features
from .prompt_generator import PromptGenerator
from .sam import SamSegmenter
from .task import Phrases

FORMAT, VERSION = "fastcss DecoupleCSS", 1
GENERATOR_FILE = "generator.safetensors"


def save_base(
    model: DecoupleCSS,
    folder: str | Path,
    *,
    detector: str | Path | None = None,
    segmenter: str | Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    training: dict | None = None,
) -> None:
    """Begin a run: write its configuration, the frozen models' weights, and the initial generator if there is one.

    Args:
        model: model with any number of tasks, which are left out.
        folder: folder of the run; it may exist if there is no run in it.
        detector, segmenter: the checkpoint folders that the model was loaded from, if the run is to refer to them
            instead of keeping copies.
        tokenizer: tokenizer of the class phrases, kept beside a copied detector; the given folder has its own.
        training: how the tasks are learned, ready for JSON; ``read_training`` gives it back.

    Raises:
        FileExistsError: there is a run already, or a ``base`` of something else.
        OSError: the run cannot be written, and was not begun.
    """
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise FileExistsError(f"DecoupleCSS: {folder} holds a run already")
    dino = model.detector.get_base_model() if model.tasks else model.detector
    places = {"detector": detector, "segmenter": segmenter}
    bases = {"detector": _config_of(dino.encoder), "segmenter": _config_of(model.segmenter.model)}
    generator = model.initial_generator
    if None in places.values() or generator is not None:
        kept = folder / "base"  # if it exists, it is from a run that was stopped while it began, or something else
        unfinished = kept.is_dir() and {path.name for path in kept.iterdir()} <= {*places, "generator"}
        with whole_folder(kept, overwrite=unfinished) as base:
            if detector is None:
                shell = empty(GroundingDinoModel, bases["detector"])
                save_pretrained(shell, base / "detector", _without_adapters(dino.state_dict()))
                if tokenizer is not None:
                    tokenizer.save_pretrained(base / "detector")
            if segmenter is None:
                sam = model.segmenter.model
                save_pretrained(sam, base / "segmenter", sam.state_dict())
            if generator is not None:
                (base / "generator").mkdir()
                save_file(generator.state_dict(), base / "generator" / GENERATOR_FILE, {"format": "pt"})
    config = {"format": FORMAT, "version": VERSION, "settings": _settings(model), "training": training}
    for part, place in places.items():
        where = f"base/{part}" if place is None else str(Path(place).resolve())
        config[part] = {"folder": where, "config": json.loads(bases[part].to_json_string(use_diff=False))}
    config["generator"] = None if generator is None else {"folder": "base/generator"}
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "config.json") as file:  # comes last, because this file makes the folder a run
        json.dump(config, file, indent=1)


def save_task(model: DecoupleCSS, t: int, folder: str | Path, *, overwrite: bool = False) -> None:
    """Write task t of the model into a run, whole or not at all.

    Raises:
        FileNotFoundError, ValueError: the folder is no run, or its settings differ from the model's.
        IndexError: the model has no such task.
        FileExistsError: the task exists, and is not to be overwritten.
        OSError: the task cannot be written; the run is as it was.
    """
    from peft import get_peft_model_state_dict

    folder = Path(folder)
    settings = _read_config(folder)["settings"]
    if settings != _settings(model):
        raise ValueError(f"DecoupleCSS: {folder} is a run of {settings}, the model has {_settings(model)}")
    if not 0 <= t < len(model.tasks):
        raise IndexError(f"DecoupleCSS: there is no task {t}, the model has {len(model.tasks)}")
    task = model.tasks[t]
    about = {
        "name": task.name,
        "classes": task.classes,
        "input_ids": task.input_ids.tolist(),
        "attention_mask": task.attention_mask.tolist(),
    }
    with whole_folder(folder / f"task_{t}", overwrite) as new:
        model.detector.peft_config[task.name].save_pretrained(new)
        adapter = get_peft_model_state_dict(model.detector, adapter_name=task.name, save_embedding_layers=False)
        save_file({name: x.contiguous() for name, x in adapter.items()}, new / WEIGHTS_FILE, {"format": "pt"})
        save_file(task.state_dict(), new / "task.safetensors", {"format": "pt"})
        save_phrase_features(task, new)
        (new / "task.json").write_text(json.dumps(about), encoding="utf-8")


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> DecoupleCSS:
    """Load the model of a run with all of its tasks, on the CPU, in eval mode.

    Args:
        folder: folder of the run.
        dtype: dtype to segment in, by default that of the run. In 16 bits the text encoder, the frequencies of SAM's
            places and the thresholds stay in float32.

    Raises:
        FileNotFoundError: the folder, or a file or task in it, does not exist.
        ValueError: the folder is no run or has a newer version, a file is incomplete or a pickle, or the tensors have
            another architecture than config.json says; the message names the first that differ. Or no model can have
            this dtype.
    """
    folder = Path(folder)
    if dtype is not None:
        check_dtype("DecoupleCSS", dtype)
    config, count = _read_config(folder), saved_tasks(folder)
    with _names(folder / "config.json"):
        dino = GroundingDinoConfig.from_dict(config["detector"]["config"])
        sam = SamConfig.from_dict(config["segmenter"]["config"])
        bases = list(checkpoint_folders(folder).values())
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are replaced
        detector = ClassDetector(load_pretrained(GroundingDinoModel, bases[0], dino, PARTS))
        segmenter = SamSegmenter(load_pretrained(SamModel, bases[1], sam))
        generator = read_generator(folder, segmenter.prompt_dim)
        with _names(folder / "config.json"):
            model = DecoupleCSS(detector, segmenter, **config["settings"], initial_generator=generator)
        for t in range(count):
            _load_task(model, standing_folder(folder / f"task_{t}"))
    if dtype is not None:
        cast(model, dtype)
    return model.eval().requires_grad_(False)


def read_training(folder: str | Path) -> dict | None:
    """Return what ``save_base`` was given as ``training``."""
    return _read_config(Path(folder)).get("training")


def read_settings(folder: str | Path) -> dict:
    """Return the settings that the run's model was made with, beside the frozen models."""
    return _read_config(Path(folder))["settings"]


def checkpoint_folders(folder: str | Path) -> dict[str, Path]:
    """Return where a run's frozen models are: "detector", which also has the tokenizer, and "segmenter"."""
    folder = Path(folder)
    config = _read_config(folder)
    return {part: folder / config[part]["folder"] for part in ("detector", "segmenter")}


def read_generator(folder: str | Path, prompt_dim: int) -> PromptGenerator | None:
    """Load the generator with which that of every new class of a run begins; None if it begins at random.

    Raises:
        FileNotFoundError, ValueError: as for ``load``.
    """
    folder = Path(folder)
    config = _read_config(folder)
    if config.get("generator") is None:
        return None
    with _names(folder / "config.json"):
        path = folder / config["generator"]["folder"] / GENERATOR_FILE
        sizes = {name: config["settings"][name] for name in ("length", "prompts", "hidden")}
        with torch.device("meta"):
            generator = PromptGenerator(1, prompt_dim=prompt_dim, **sizes)
    tensors = read_tensors(path, "DecoupleCSS")
    check_tensors(tensors, generator.state_dict(), f"DecoupleCSS: {path}")
    generator.load_state_dict(tensors, assign=True)
    return generator


def saved_tasks(folder: str | Path) -> int:
    """Count the tasks of a run; raise FileNotFoundError if one before the last is missing."""
    names = (re.fullmatch(r"(\.)?task_(0|[1-9]\d*)(?(1)\.old)", path.name) for path in Path(folder).iterdir())
    there = {int(name[2]) for name in names if name}
    for t in range(len(there)):
        if t not in there:
            raise FileNotFoundError(f"DecoupleCSS: {Path(folder) / f'task_{t}'} is missing; there is task_{max(there)}")
    return len(there)


def _settings(model: DecoupleCSS) -> dict:
    lora = model.lora_settings
    sites = next(name for name, pattern in LORA_SITES.items() if pattern == lora["target_modules"])
    return {
        "threshold": model.threshold, **model.generator_settings, "rank": lora["r"], "alpha": lora["lora_alpha"],
        "sites": sites, "presence": model.presence, "confidence": model.confidence,
    }  # fmt: skip


def _config_of(model: torch.nn.Module) -> PreTrainedConfig:
    """Return the model's configuration as it is now: with its present dtype, without the place it was loaded from."""
    config = copy.deepcopy(model.config)
    config.dtype, config._name_or_path = next(model.parameters()).dtype, ""
    return config


def _without_adapters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the base model's tensors by their own names: PEFT keeps an adapted layer's under ``base_layer``."""
    return {name.replace(".base_layer.", "."): x for name, x in state.items() if ".lora_" not in name}


def _read_config(folder: Path) -> dict:
    if not folder.is_dir():
        raise FileNotFoundError(f"DecoupleCSS: no such folder: {folder}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"DecoupleCSS: {folder} is no run: it has no config.json")
    config = _read_json(folder / "config.json", ())
    if config.get("format") != FORMAT:
        raise ValueError(f"DecoupleCSS: {folder} is no run: its config.json has no format {FORMAT!r}")
    if config.get("version") != VERSION:
        raise ValueError(
            f"DecoupleCSS: {folder} is of version {config.get('version')}, this fastcss reads version {VERSION}"
        )
    config = _read_json(folder / "config.json", ("settings", "detector", "segmenter"))
    config["settings"] = {"presence": "best"} | config["settings"]  # runs from before eq. A.2 was followed lack it
    return config


def _read_json(path: Path, keys: tuple[str, ...]) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"DecoupleCSS: {path} is missing")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"DecoupleCSS: {path} is no JSON: {error}") from error
    if not isinstance(content, dict) or not content.keys() >= set(keys):
        raise ValueError(f"DecoupleCSS: {path} must hold {', '.join(keys) or 'an object'}")
    return content


@contextlib.contextmanager
def _names(path: Path) -> Iterator[None]:
    """Name the file in errors about its content."""
    try:
        yield
    except Exception as error:  # transformers raises exceptions of its own
        raise ValueError(f"DecoupleCSS: {path}: {error}") from error


def _load_task(model: DecoupleCSS, folder: Path) -> None:
    from peft import get_peft_model_state_dict

    about = _read_json(folder / "task.json", ("name", "classes", "input_ids", "attention_mask"))
    lora = _read_json(folder / CONFIG_FILE, tuple(model.lora_settings))
    adapter = read_tensors(folder / WEIGHTS_FILE, "DecoupleCSS")
    tensors = read_tensors(folder / "task.safetensors", "DecoupleCSS")
    with _names(folder / "task.json"):
        phrases = Phrases(torch.tensor(about["input_ids"]), torch.tensor(about["attention_mask"]))
        task = model.add_task(about["classes"], phrases, name=about["name"])
    places = get_peft_model_state_dict(model.detector, adapter_name=task.name, save_embedding_layers=False)
    check_tensors(adapter, places, f"DecoupleCSS: {folder / WEIGHTS_FILE}")
    check_tensors(tensors, task.state_dict(), f"DecoupleCSS: {folder / 'task.safetensors'}")
    for name, wanted in model.lora_settings.items():
        if lora[name] != wanted:
            raise ValueError(f"DecoupleCSS: {folder / CONFIG_FILE}: {name} is {lora[name]!r}, the run has {wanted!r}")
    for name, place in places.items():  # the tensors are views of the adapter's parameters
        place.copy_(adapter[name])
    task.load_state_dict(tensors)
    load_phrase_features(task, folder)
