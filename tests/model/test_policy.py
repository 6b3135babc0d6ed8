"""A folder's tokenizer fits its model, or one line says what is missing in which folder.

pytest tests/model/test_policy.py
"""

import importlib.util
import json
from pathlib import Path

import pytest
from conftest import tiny_policy
from test_grpo import soft_trainer
from transformers import PreTrainedTokenizerFast

from rl_soft.model import policy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tiny_policy()
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(folder: Path) -> str:
    with pytest.raises(ValueError) as error:
        policy.load_policy(str(folder))
    message = str(error.value)
    assert str(folder) in message and "\n" not in message
    return message


@pytest.mark.parametrize("kept", [[], ["tokenizer_config.json"]])
def test_no_tokenizer(folder: Path, kept: list[str]) -> None:
    for file in folder.glob("tokenizer*"):
        if file.name not in kept:
            file.unlink()
    assert "has no tokenizer (tokenizer.json" in refused(folder)


def test_no_end_of_text(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")
    tokenizer.save_pretrained(folder)
    assert "has no end-of-text token; set eos_token" in refused(folder)


def test_no_padding_is_the_end_of_text(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<eos>")
    tokenizer.save_pretrained(folder)
    loaded = policy.load_policy(str(folder)).tokenizer
    assert loaded.pad_token_id == loaded.eos_token_id is not None
    assert loaded.padding_side == "left"


@pytest.mark.parametrize("name", ["pad_token", "eos_token"])
def test_a_special_token_beyond_the_rows(folder: Path, name: str) -> None:
    tokenizer = policy.load_policy(str(folder)).tokenizer
    rows = len(tokenizer)
    tokenizer.add_special_tokens({name: "<beyond>"})
    tokenizer.save_pretrained(folder)
    assert f"the {name} '<beyond>' of {folder} has id {rows}, and the model has {rows} rows" in refused(folder)


def test_a_token_beyond_the_rows_that_nothing_needs(folder: Path) -> None:
    tokenizer = policy.load_policy(str(folder)).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]}, replace_extra_special_tokens=False)
    tokenizer.save_pretrained(folder)
    assert len(policy.load_policy(str(folder)).tokenizer) == len(tokenizer)


def test_the_tokenizer_of_a_larger_model(folder: Path) -> None:
    policy.character_tokenizer("abcdefghijklmnopqrstuvwxyz").save_pretrained(folder)
    assert "has 31 tokens, and the model 20 rows of embeddings" in refused(folder)


SLOW = {
    "tokenizer.model": "LlamaTokenizer",
    "sentencepiece.bpe.model": "M2M100Tokenizer",
    "spiece.model": "T5Tokenizer",
}


@pytest.mark.skipif(importlib.util.find_spec("sentencepiece") is not None, reason="sentencepiece is installed")
@pytest.mark.parametrize("file", SLOW)
def test_a_slow_tokenizer_without_its_package(folder: Path, file: str) -> None:
    for old in folder.glob("tokenizer*"):
        old.unlink()
    (folder / file).write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": SLOW[file]}))
    (folder / "vocab.json").write_text("{}")
    message = refused(folder)
    assert f"{file} needs the package sentencepiece (pip install sentencepiece)" in message


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": "{"},
        {"tokenizer.json": "{}"},
        {"tokenizer_config.json": "{"},
        {
            "tokenizer.json": None,
            "vocab.json": '{"a": 0}',
            "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}',
        },
        {
            "tokenizer.json": None,
            "vocab.txt": "a\n",
            "own.py": "raise SystemExit('run')",
            "tokenizer_config.json": '{"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", null]}}',
        },
    ],
)
def test_a_broken_tokenizer(folder: Path, files: dict[str, str | None]) -> None:
    """Code beside a tokenizer is not run, and nobody is asked whether to."""
    for name, text in files.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    assert f"the tokenizer of {folder} cannot be loaded: " in refused(folder)


def test_a_tokenizer_that_is_given_to_a_trainer_is_checked_too(folder: Path, tmp_path: Path) -> None:
    made = policy.load_policy(str(folder))
    beyond = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="<beyond>", eos_token="<eos>"
    )
    with pytest.raises(ValueError, match="the pad_token '<beyond>' of processing_class has id 20"):
        soft_trainer(tmp_path / "run", made=policy.Policy(made.model, beyond, None))
