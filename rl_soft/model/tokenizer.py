"""The tokenizer of a model folder: loaded, or what is missing said in one line that names the folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rl_soft.model.adapters import base_missing
from rl_soft.model.folder import base_of, has_tokenizer, is_adapter


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or a hub id, which pads on the left, with <eos> where it has no pad token.

    An adapter's folder without a tokenizer has that of its base.

    Raises:
        ValueError: a folder without a tokenizer; one that needs a package or cannot be read.
        OSError: transformers', for a name that is neither a folder nor to be had from the hub.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not has_tokenizer(folder):
        if is_adapter(folder):
            base = base_of(folder)
            try:
                return load_tokenizer(base)
            except OSError as error:
                raise base_missing(folder, base, error) from None
        raise ValueError(f"{name_or_path} has no tokenizer: tokenizer.json, or another vocabulary, is missing there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, padding_side="left", trust_remote_code=False, revision=revision or "main"
        )
    except Exception as error:  # the readers of vocabularies, with and without their packages, raise what they like
        if isinstance(error, OSError) and not folder.is_dir():
            raise
        raise ValueError(f"the tokenizer of {name_or_path} cannot be loaded: {_reason(folder, error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _reason(folder: Path, error: Exception) -> str:
    for pattern, package in (("*.model", "sentencepiece"), ("*.tiktoken", "tiktoken")):
        file = next(folder.glob(pattern), None)
        if file is not None and not (folder / "tokenizer.json").exists() and not importlib.util.find_spec(package):
            return f"{file.name} needs the package {package} (pip install {package}), and tokenizer.json is missing"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def check_tokenizer(tokenizer: Any, model: Any, name: str) -> None:
    """Raises ValueError for a tokenizer without an end of text, or one whose ids have no rows in the model.

    Args:
        name: the folder or whatever else names the two, for the message.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer of {name} has no end-of-text token; set eos_token in its tokenizer_config.json"
        )
    rows = model.config.get_text_config().vocab_size
    for kind in ("pad_token", "eos_token"):
        token_id = getattr(tokenizer, f"{kind}_id")
        if token_id is not None and token_id >= rows:
            raise ValueError(
                f"the {kind} {getattr(tokenizer, kind)!r} of {name} has id {token_id}, and the model has {rows} rows "
                f"of embeddings; set {kind} to one that it has, or give the model more rows (resize_token_embeddings)"
            )
    if tokenizer.vocab_size > rows:
        raise ValueError(
            f"the tokenizer of {name} has {tokenizer.vocab_size} tokens, and the model {rows} rows of embeddings; "
            "is it the tokenizer of another model?"
        )
