"""Tests phrases of classes: which there are, what users bring instead, and what a BERT tokenizer makes of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer, GroundingDinoConfig

from fastcss.data.ade import CLASSES as ADE_CLASSES
from fastcss.data.voc import CLASSES as VOC_CLASSES
from fastcss.models.class_detector import ClassDetector
from fastcss.models.phrases import ADJECTIVES, describe, encode, load_tokenizer, read_phrases

WORDS = ("table", "dining", "cat", "##s", ".", *ADJECTIVES)
OWN = {"cat": ["sleepy cat", "grey cat"], "dining table": ["set table", "oak table"]}


def write_vocabulary(folder: Path) -> Path:
    """Write BERT's special tokens where the detector looks for them, and the words after those."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    folder = write_vocabulary(tmp_path / "vocabulary")
    return BertTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=32)


def test_by_default_the_name_and_thirty_adjectives():
    cat, table = describe(["cat", "dining table"])
    assert len(cat) == len(table) == len(set(cat)) == len(set(table)) == 31
    assert cat[:2] == ["cat", "small cat"]
    assert table[0] == "dining table"
    assert table[1:] == [f"{adjective} dining table" for adjective in ADJECTIVES]


@pytest.mark.parametrize("classes", [VOC_CLASSES, ADE_CLASSES])
def test_no_two_classes_share_a_phrase(classes):
    phrases = [phrase for described in describe(classes) for phrase in described]
    assert len(set(phrases)) == len(phrases) == 31 * len(classes)


def test_own_phrases_stand_beside_the_name(tmp_path):
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(OWN | {"Bär": ["brown bear", "white bear"]}, ensure_ascii=False), encoding="utf-8")
    own = read_phrases(path)
    assert describe(["dining table", "cat"], own=own) == [
        ["dining table", "set table", "oak table"],
        ["cat", "sleepy cat", "grey cat"],
    ]
    assert describe(["Bär"], own=own) == [["Bär", "brown bear", "white bear"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON: Expecting property name"),
        (b"\xff\xff{}", "is no JSON"),
        ('["cat"]', "must be an object {class: [phrases]} of at least one class"),
        ("{}", "must be an object {class: [phrases]} of at least one class"),
        ('{"cat": []}', "class 'cat' must have a list of at least one phrase, got []"),
        ('{"cat": "red cat"}', "class 'cat' must have a list of at least one phrase, got 'red cat'"),
        ('{"cat": null}', "class 'cat' must have a list of at least one phrase, got None"),
        ('{"cat": ["red cat", 3]}', "phrases of class 'cat' must be words, got 3"),
        ('{"cat": [" "]}', "phrases of class 'cat' must be words, got ' '"),
        ('{"cat": ["?"]}', "phrases of class 'cat' must be words, got '?'"),
        ('{"cat": ["a", "b"], "dog": ["a"]}', "every class must have as many phrases, 'cat' has 2 and 'dog' 1"),
    ],
)
def test_files_that_are_refused(content, message, tmp_path):
    path = tmp_path / "phrases.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=re.escape(f"read_phrases: {path}") + ".*" + re.escape(message)):
        read_phrases(path)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(f"read_phrases: no such file: {path}")):
            read_phrases(path)


def test_descriptions_that_cannot_be():
    with pytest.raises(ValueError, match="own has no phrases for class 'dog'; it has cat, dining table"):
        describe(["cat", "dog"], own=OWN)
    with pytest.raises(ValueError, match="describe: own: every class must have as many phrases"):
        describe(["cat"], own=OWN | {"dog": ["wet dog"]})
    for names in ([], "cat"):
        with pytest.raises(ValueError, match="names must be a list of at least one class"):
            describe(names)


def test_ids_between_their_ends_and_filled_up(tokenizer):
    encoded = encode(tokenizer, [["cat", "small cats"], ["dining table", "red dining table."]])
    cls, sep, s = 101, 102, 107
    table, dining, cat, stop, small, red = (
        tokenizer.convert_tokens_to_ids(word) for word in ("table", "dining", "cat", ".", "small", "red")
    )
    assert encoded.input_ids.tolist() == [
        [[cls, cat, sep, 0, 0, 0], [cls, small, cat, s, sep, 0]],
        [[cls, dining, table, sep, 0, 0], [cls, red, dining, table, stop, sep]],
    ]
    assert encoded.attention_mask.sum(-1).tolist() == [[3, 5], [4, 6]]
    assert torch.equal(encoded.attention_mask, (encoded.input_ids != 0).long())


def test_the_detector_reads_the_words_alone(tokenizer):
    """A phrase must be the mean of its words, whatever its padding."""
    detector = ClassDetector.random("tiny")
    alone = encode(tokenizer, [["cat"]])
    beside = encode(tokenizer, [["cat"], ["small dining table"]])
    with torch.no_grad():
        first = detector.embed_phrases(alone.input_ids, alone.attention_mask)
        both = detector.embed_phrases(beside.input_ids, beside.attention_mask)
        word = detector.text_backbone(alone.input_ids[0]).last_hidden_state[:, 1:2]
    torch.testing.assert_close(first, detector.text_projection(word))
    torch.testing.assert_close(both[:1], first)
    assert (both[1] - both[0]).abs().max() > 0.1


def test_default_phrases_of_a_known_class_are_all_known(tokenizer):
    encoded = encode(tokenizer, describe(["cat", "dining table"]))
    assert encoded.input_ids.shape == encoded.attention_mask.shape == (2, 31, 5)
    assert (encoded.input_ids != tokenizer.unk_token_id).all()
    assert len({tuple(ids) for ids in encoded.input_ids.flatten(0, 1).tolist()}) == 62


@pytest.mark.parametrize(
    ("descriptions", "message"),
    [
        ([["cat"], ["zebu"]], "the tokenizer knows no word of phrase 'zebu' of class 'zebu'"),
        ([["cat", "felid"]], "the tokenizer knows no word of phrase 'felid' of class 'cat'"),
        ([["cat", ""]], "the tokenizer knows no word of phrase '' of class 'cat'"),
        ([["cat", "cat " * 31]], "of class 'cat' has 33 tokens, at most 32 can be read"),
        ([["cat"], ["table", "red table"]], "must be equally many for every class, got [1, 2]"),
        ([[], []], "must be equally many for every class, got [0]"),
        ([], "must be equally many for every class, got []"),
    ],
)
def test_phrases_that_nothing_can_be_made_of(tokenizer, descriptions, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encode(tokenizer, descriptions)


def test_one_unknown_word_among_known_ones_is_no_error(tokenizer):
    assert encode(tokenizer, [["red zebu"]]).input_ids[0, 0, 2] == tokenizer.unk_token_id


@pytest.mark.parametrize("form", ["saved", "vocab.txt beside a configuration"])
def test_a_tokenizer_from_its_folder(form, tokenizer, tmp_path):
    folder = tmp_path / "model"
    if form == "saved":
        tokenizer.save_pretrained(folder)
    else:
        write_vocabulary(folder)
        GroundingDinoConfig().save_pretrained(folder)
    loaded = load_tokenizer(folder)
    descriptions = describe(["cat", "dining table"])
    assert torch.equal(encode(loaded, descriptions).input_ids, encode(tokenizer, descriptions).input_ids)


@pytest.mark.parametrize(("given", "limit"), [(None, 512), (10**9, 512), (32, 32)])
def test_no_phrase_is_longer_than_the_text_encoder_reads(tokenizer, tmp_path, given, limit):
    """A tokenizer need not know how many positions the text encoder has."""
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    GroundingDinoConfig().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["model_max_length"] = given
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has 602 tokens, at most {limit} can be read"):
        encode(load_tokenizer(folder), [["cat", "cat " * 600]])


def test_folders_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such folder: {tmp_path / 'none'}")):
        load_tokenizer(tmp_path / "none")
    GroundingDinoConfig().save_pretrained(tmp_path / "bare")
    looked = "has no tokenizer: looked for tokenizer.json or vocab.txt"
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path / 'bare'} {looked}")):
        load_tokenizer(tmp_path / "bare")


def test_a_tokenizer_that_is_not_whole(tokenizer, tmp_path):
    folder = tmp_path / "model"
    tokenizer.save_pretrained(folder)
    whole = (folder / "tokenizer.json").read_text(encoding="utf-8")
    for content in (whole[: len(whole) // 2], "{}", ""):
        (folder / "tokenizer.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(f"{folder} has no tokenizer that can be read: ")):
            load_tokenizer(folder)


def test_a_folder_with_code_of_its_own_is_refused_and_not_run(tokenizer, tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import BertTokenizer as Own\n", encoding="utf-8"
    )
    with pytest.raises(ValueError, match=re.escape(f"{folder} has no tokenizer that can be read: ")):
        load_tokenizer(folder)
    assert not ran.exists()
