"""Makes the short phrases that a detector reads of a class: what it is called and how it may look."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .task import Phrases

#: A folder with neither of these files has no vocabulary, and transformers would make up an empty one.
VOCABULARIES = ("tokenizer.json", "vocab.txt")

#: Words that fit any class: they name size, colour, shape, texture, material, lighting, position and condition.
ADJECTIVES = (
    *("small", "large", "tiny", "tall"),
    *("red", "blue", "green", "black", "white", "colorful"),
    *("round", "long", "thin", "curved"),
    *("smooth", "rough", "shiny", "striped"),
    *("wooden", "metallic", "plastic"),
    *("bright", "dark", "shaded"),
    *("distant", "nearby", "tilted"),
    *("new", "old", "dirty"),
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint folder from local files only, without running any code of the folder.

    Its ``model_max_length`` is at most what the text encoder of the folder's configuration reads, if there is one.

    Raises:
        FileNotFoundError: the folder does not exist, or has no vocabulary.
        ValueError: transformers cannot read a tokenizer from the folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_tokenizer: no such folder: {folder}")
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise FileNotFoundError(f"load_tokenizer: {folder} has no tokenizer: looked for {' or '.join(VOCABULARIES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the package tokenizers raises nothing narrower
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"load_tokenizer: {folder} has no tokenizer that can be read: {reason}") from error
    tokenizer.model_max_length = min(tokenizer.model_max_length, _positions(folder))
    return tokenizer


def describe(names: Sequence[str], *, own: Mapping[str, Sequence[str]] | None = None) -> list[list[str]]:
    """Return M + 1 phrases for each of c classes: the name alone, and M that say how the class looks.

    In the paper a language model writes the M = 30 phrases of each class. Here one list of adjectives stands before the
    name, unless the user brings phrases.

    Args:
        names: names of the classes.
        own: class → its M phrases, equally many for every class; may have classes beyond ``names``.

    Returns:
        c lists of M + 1 phrases; 31 by default.

    Raises:
        ValueError: ``own`` lacks a class of ``names``, or is what ``read_phrases`` refuses.

    Source: DecoupleCSS section 3.2.1 and appendix B.1.

    Example:
        >>> describe(["dining table"])[0][:3]
        ['dining table', 'small dining table', 'large dining table']
    """
    if isinstance(names, str) or not names:
        raise ValueError(f"describe: names must be a list of at least one class, got {names!r}")
    if own is None:
        return [[name, *(f"{adjective} {name}" for adjective in ADJECTIVES)] for name in names]
    _check(own, "describe: own")
    for name in names:
        if name not in own:
            raise ValueError(f"describe: own has no phrases for class {name!r}; it has {', '.join(own)}")
    return [[name, *own[name]] for name in names]


def read_phrases(path: str | Path) -> dict[str, list[str]]:
    """Read a user's phrases for ``describe``: a JSON object ``{class: [phrase, …]}``, equally many for every class.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is no JSON or no such object, a class has no phrases or more than another, or a phrase has
            no words.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_phrases: no such file: {path}")
    try:
        own = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"read_phrases: {path} is no JSON: {error}") from error
    _check(own, f"read_phrases: {path}")
    return own


def encode(tokenizer: PreTrainedTokenizerBase, descriptions: Sequence[Sequence[str]]) -> Phrases:
    """Turn phrases into ids between [CLS] and [SEP], filled up to the longest.

    Args:
        tokenizer: the detector's tokenizer.
        descriptions: c lists of M phrases, the class's name first, from ``describe``.

    Returns:
        Ids and mask, int64 ``[c, M, L]``.

    Raises:
        ValueError: the classes have unequally many phrases, or the tokenizer knows no word of a phrase, or a phrase is
            longer than the text encoder reads.
    """
    counts = {len(phrases) for phrases in descriptions}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"encode: descriptions must be equally many for every class, got {sorted(counts)}")
    flat = [phrase for phrases in descriptions for phrase in phrases]
    ids, mask = (tokenizer(flat, padding=True, return_tensors="pt")[key] for key in ("input_ids", "attention_mask"))
    known = ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    of_class = [phrases[0] for phrases in descriptions for _ in phrases]
    for name, phrase, words, length in zip(of_class, flat, known.sum(1).tolist(), mask.sum(1).tolist(), strict=True):
        if not words:
            raise ValueError(f"encode: the tokenizer knows no word of phrase {phrase!r} of class {name!r}")
        if length > tokenizer.model_max_length:
            raise ValueError(
                f"encode: phrase {phrase!r} of class {name!r} has {length} tokens, at most "
                f"{tokenizer.model_max_length} can be read"
            )
    shape = (len(descriptions), *counts)
    return Phrases(ids.unflatten(0, shape), mask.unflatten(0, shape))


def _positions(folder: Path) -> float:
    """Return how many tokens the folder's text encoder has positions for, which a tokenizer need not know."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # loading the model will report a bad file
        return json.loads((folder / "config.json").read_bytes())["text_config"]["max_position_embeddings"]
    return math.inf


def _check(own: object, where: str) -> None:
    if not isinstance(own, Mapping) or not own:
        raise ValueError(f"{where} must be an object {{class: [phrases]}} of at least one class")
    count = None
    for name, phrases in own.items():
        if isinstance(phrases, str) or not isinstance(phrases, Sequence) or not phrases:
            raise ValueError(f"{where}: class {name!r} must have a list of at least one phrase, got {phrases!r}")
        for phrase in phrases:
            if not isinstance(phrase, str) or not any(map(str.isalnum, phrase)):
                raise ValueError(f"{where}: phrases of class {name!r} must be words, got {phrase!r}")
        count = len(phrases) if count is None else count
        if len(phrases) != count:
            raise ValueError(
                f"{where}: every class must have as many phrases, {next(iter(own))!r} has {count} and {name!r} "
                f"{len(phrases)}"
            )
