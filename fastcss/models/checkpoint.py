"""Loads checkpoints from the folders that transformers writes, only into the architecture they were made for."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: What stays in float32 when a model is cast to 16 bits, since it matters to the result and hardly to the time. SAM's
#: frequencies of places are angles of many turns. The text encoder runs once for all pictures, or never where a run
#: keeps its features, which hang on the weights it has. And r of eq. A.2 is compared with the thresholds.
IN_FLOAT32 = frozenset({"shared_image_embedding", "text_backbone", "text_projection", "thresholds"})
_NAMED = 3  # so many tensors are named in an error message


def load_pretrained(
    model_class: type[PreTrainedModel],
    folder: str | Path,
    config: PreTrainedConfig | None = None,
    parts: Collection[str] | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """Load a model with the weights of a folder: safetensors only, no network.

    Args:
        model_class: class of the model.
        folder: folder as ``save_pretrained`` writes it, for this class or one with heads on it; also from transformers
            4.
        config: the architecture wanted; by default that of the folder's own configuration.
        parts: names of the submodules and parameters that the folder must have; by default all.
        dtype: dtype of the loaded weights, whatever the folder's; by default that of the configuration.

    Raises:
        FileNotFoundError: the folder does not exist, or has no configuration or no safetensors, perhaps a pickle
            instead.
        ValueError: the configuration or weights cannot be read, or the checkpoint has another architecture; the message
            names the first tensors that differ.
    """
    folder = Path(folder)
    _check_files(model_class, folder)
    with _quiet():
        if config is None:
            config = _read_config(model_class.config_class, folder)
        try:
            model, info = model_class.from_pretrained(
                folder, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True,
                ignore_mismatched_sizes=True, dtype=dtype or config.dtype or "auto",
            )  # fmt: skip
        except SafetensorError as error:
            raise ValueError(f"{folder} holds no whole safetensors file: {error}") from error
    needed = [name for name in model.state_dict() if parts is None or name.split(".")[0] in parts]
    other = {name: (list(there), list(here)) for name, there, here in info["mismatched_keys"]}
    absent = set(info["missing_keys"]) - _unused(model)
    problems = [f"{name} is {other[name][0]}, wanted {other[name][1]}" for name in needed if name in other]
    problems += [f"{name} is missing" for name in needed if name in absent]
    kinds = {re.sub(r"\d+", "0", name) for name in needed}  # a further layer makes another model, an unused head not
    problems += [f"{name} is not wanted" for name in info["unexpected_keys"] if re.sub(r"\d+", "0", name) in kinds]
    _raise(problems, str(folder))
    return model


def check_dtype(where: str, dtype: torch.dtype) -> None:
    """Raise ValueError unless a model can have this dtype; ``where`` says whose argument it is."""
    if dtype not in DTYPES:
        raise ValueError(f"{where}: dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters and buffers in place, but for those of ``IN_FLOAT32`` to at least float32.

    Whatever reads these casts what they make to the dtype of the rest.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point():
            exact = not IN_FLOAT32.isdisjoint(name.split("."))
            tensor.data = tensor.data.to(torch.promote_types(dtype, torch.float32) if exact else dtype)


def save_pretrained(model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write what ``load_pretrained`` reads: the tensors ``state``, with the model's configuration."""
    with _quiet():
        model.save_pretrained(folder, state_dict=dict(state))


def _check_files(model_class: type[PreTrainedModel], folder: Path) -> None:
    """Check the folder's files before transformers does, whose errors name no file or no remedy."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{model_class.__name__}: no such folder: {folder}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model_class.__name__}: {folder} has no config.json: save_pretrained writes one")
    if any((folder / name).is_file() for name in WEIGHTS):
        return
    for pickle in (folder / name for name in PICKLES):
        if pickle.is_file():
            raise FileNotFoundError(
                f"{model_class.__name__}: {folder} has no {WEIGHTS[0]} but {pickle.name}, a pickle, and loading it "
                "would run any code in it; save it as safetensors (transformers' save_pretrained does by default)"
            )
    raise FileNotFoundError(f"{model_class.__name__}: {folder} has no {WEIGHTS[0]}")


def _read_config(config_class: type[PreTrainedConfig], folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    kind = content.get("model_type") if isinstance(content, dict) else content
    if kind != config_class.model_type:
        raise ValueError(f"{folder} holds a {kind!r}, wanted a {config_class.model_type!r}")
    try:
        content, _ = config_class.get_config_dict(folder, local_files_only=True)
        return config_class.from_dict(content)
    except Exception as error:  # transformers raises exceptions of its own
        raise ValueError(f"{path}: {error}") from error


def _unused(model: PreTrainedModel) -> set[str]:
    """Return the parameters that a submodel has but, as its class says, never reads.

    transformers 4 had no ``layernorm`` in a Swin backbone, so its folders have none.
    """
    names = set()
    for prefix, module in model.named_modules():
        patterns = getattr(module, "_keys_to_ignore_on_load_missing", None) or () if prefix else ()
        own = [name for name, _ in module.named_parameters()] if patterns else []
        names |= {f"{prefix}.{name}" for name in own if any(re.match(pattern, name) for pattern in patterns)}
    return names


def check_tensors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    """Raise ValueError, naming the first tensors, if names or shapes differ; ``where`` says where ``got`` is from."""
    problems = [
        f"{name} is {list(got[name].shape)}, wanted {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in got and got[name].shape != tensor.shape
    ]
    problems += [f"{name} is missing" for name in wanted if name not in got]
    problems += [f"{name} is not wanted" for name in got if name not in wanted]
    _raise(problems, where)


def empty(model_class: type[nn.Module], config: PreTrainedConfig) -> nn.Module:
    """Make the model without memory for its tensors: they have only names and shapes."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))  # a copy, because a model writes its dtype into its configuration


def _raise(problems: list[str], where: str) -> None:
    if problems:
        rest = f"; and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        raise ValueError(f"{where} is of another architecture: {'; '.join(problems[:_NAMED])}{rest}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' table of missing tensors, which here are an error or do not matter."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
