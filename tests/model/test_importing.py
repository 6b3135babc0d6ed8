"""Made-up checkpoints of each published layout give the answers that the released forward gives.

The modules below have the attribute names of the released classes, so that their state dicts have the names of the
released checkpoints. `answer` is the released inference: states fed back one by one, through the projection where
there is one, then the end mark, then greedy tokens.

pytest tests/model/test_importing.py
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from rl_soft.cli.app import main
from rl_soft.evaluation.generation import generate
from rl_soft.model.importing import import_checkpoint
from rl_soft.model.policy import load_policy
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.layout import Layout

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512}
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "llama": ["q_proj", "v_proj", "o_proj", "down_proj"]}
QUESTION = "7+5-2="
WRITTEN = 12  # answer tokens that are compared


def base(folder: Path, values: dict[str, Any], tied: bool = True, beyond: int = 0) -> Any:
    """A base with a tokenizer that has neither a padding token nor our marks; `beyond`: rows without a token."""
    ids = {token: i for i, token in enumerate(["<eos>", "<bos>", *"0123456789+-=\n#"])}
    inner = Tokenizer(models.WordLevel(ids, unk_token="#"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    if values["model_type"] == "llama":  # the one puts <bos> before a text, the other only knows it
        inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")
    config = AutoConfig.for_model(
        **values, vocab_size=len(ids) + beyond, eos_token_id=0, bos_token_id=1, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


class Codi(nn.Module):
    def __init__(self, model: Any, kind: str, lora: bool = True, projection: bool = True, norm: bool = True):
        super().__init__()
        self.bot_id = model.config.vocab_size + 1
        self.eot_id = self.bot_id + 1
        model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=TARGETS[kind])
        self.codi = peft.get_peft_model(model, config) if lora else model
        if projection:
            self.prj = nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 32))
            if norm:
                self.prj.add_module("ln", nn.LayerNorm(32))

    def project(self, state: torch.Tensor) -> torch.Tensor:
        return self.prj(state) if hasattr(self, "prj") else state


class SimCodi(Codi):
    def __init__(self, model: Any, kind: str):
        super().__init__(model, kind)
        self.decoder, self.pj_in = AutoModelForCausalLM.from_config(model.config), nn.Linear(32, 32)


class Coconut(nn.Module):
    def __init__(self, model: Any, kind: str):
        super().__init__()
        self.bot_id = model.config.vocab_size
        self.eot_id = self.bot_id + 1
        model.resize_token_embeddings(self.bot_id + 3, mean_resizing=False)
        self.base_causallm = model
        self.embedding = model.get_input_embeddings()

    def project(self, state: torch.Tensor) -> torch.Tensor:
        return state


class SimCoconut(Coconut):
    def __init__(self, model: Any, kind: str):
        super().__init__(model, kind)
        self.expainable_llm = AutoModelForCausalLM.from_config(model.config)


def trained(module: nn.Module) -> nn.Module:
    """Weights that no part of it shares with another, and an adapter that does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.1 * torch.randn(p.shape)
    return module.eval()


@torch.no_grad()
def answer(module: Any, ids: list[int], n: int = 6) -> tuple[list[int], list[float]]:
    """Greedy tokens up to <eos>, and their log-probabilities, without a cache: the whole row anew for each."""
    model = getattr(module, "codi", None) or module.base_causallm
    embed = model.get_input_embeddings()
    row = embed(torch.tensor([[*ids, module.bot_id]]))
    for _ in range(n):
        state = model(inputs_embeds=row, output_hidden_states=True).hidden_states[-1][:, -1:]
        row = torch.cat([row, module.project(state)], dim=1)
    row = torch.cat([row, embed(torch.tensor([[module.eot_id]]))], dim=1)
    tokens, log_probs = [], []
    while len(tokens) < WRITTEN and 0 not in tokens:
        log_p = model(inputs_embeds=row).logits[0, -1].log_softmax(-1)
        tokens.append(int(log_p.argmax()))
        log_probs.append(float(log_p.max()))
        row = torch.cat([row, embed(torch.tensor([tokens[-1:]]))], dim=1)
    return tokens, log_probs


CASES = {  # name -> (base, its head is the matrix of its embeddings, what is trained, the text behind a question)
    "CODI GPT-2": (GPT2, True, Codi, ""),
    "CODI Llama": (LLAMA, True, Codi, ""),
    "CODI, all weights, no projection": (LLAMA, False, lambda m, k: Codi(m, k, lora=False, projection=False), ""),
    "SIM-CoT on CODI": (LLAMA, True, SimCodi, ""),
    "Coconut GPT-2": (GPT2, True, Coconut, "\n"),
    "SIM-CoT on Coconut": (LLAMA, False, SimCoconut, "\n"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
@pytest.mark.parametrize("case", CASES)
def test_an_imported_checkpoint_answers_as_the_released_forward(tmp_path: Path, case: str, kind: str) -> None:
    values, tied, make, after = CASES[case]
    model, tokenizer = base(tmp_path / "base", values, tied)
    module = trained(make(model, values["model_type"]))
    state = {key: weight.clone().contiguous() for key, weight in module.state_dict().items()}
    if kind == "torch":
        checkpoint = tmp_path / "checkpoint_30"  # Coconut's have no suffix
        torch.save({f"module.{key}": weight for key, weight in state.items()}, checkpoint)  # as DDP names them
    else:
        checkpoint = tmp_path / "released"
        checkpoint.mkdir()
        state.pop(next((key for key in state if tied and key.endswith("lm_head.weight")), ""), None)
        save_file(state, checkpoint / "model.safetensors")
    thinking = import_checkpoint(str(checkpoint), tmp_path / "ours", str(tmp_path / "base"))
    assert thinking.num_thoughts == 6 and thinking.thought == "hidden"

    expected, log_probs = answer(module, tokenizer(QUESTION + after)["input_ids"])
    ours = load_policy(str(tmp_path / "ours"))
    layout = Layout(ours.thinking, ours.tokenizer)
    out = rollout(ours.model, layout, [layout.prompt_ids(QUESTION)] * 2, None)
    for row in range(2):
        action = (out.action_mask & ~out.thought_mask)[row]
        assert out.completion_ids[row, action][:WRITTEN].tolist() == expected
        found = out.log_probs[row, action][: len(expected)]
        assert (found - torch.tensor(log_probs)).abs().max() < 1e-4
    ((done,),) = generate(ours.model, ours.tokenizer, [QUESTION], thinking=ours.thinking, greedy=True)
    assert done.answer_ids[:WRITTEN] == expected


@pytest.mark.filterwarnings("ignore")
def test_marks_without_an_id_get_one(tmp_path: Path) -> None:
    """A base with more rows than its tokenizer has ids (Qwen): CODI's marks stand behind all of them."""
    model, tokenizer = base(tmp_path / "base", LLAMA, beyond=9)
    module = trained(Codi(model, "llama"))
    torch.save(module.state_dict(), tmp_path / "pytorch_model.bin")
    import_checkpoint(str(tmp_path), tmp_path / "ours", str(tmp_path / "base"))
    ours = load_policy(str(tmp_path / "ours"))
    ((done,),) = generate(ours.model, ours.tokenizer, [QUESTION], thinking=ours.thinking, greedy=True)
    assert done.answer_ids[:WRITTEN] == answer(module, tokenizer(QUESTION)["input_ids"])[0]


@pytest.mark.filterwarnings("ignore")
def test_the_command_imports_and_eval_runs_it(tmp_path: Path) -> None:
    model, tokenizer = base(tmp_path / "base", GPT2)
    module = trained(Coconut(model, "gpt2"))
    torch.save(module.state_dict(), tmp_path / "checkpoint_3")
    tokens, _ = answer(module, tokenizer(QUESTION + "\n")["input_ids"], n=4)
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    row = {"question": QUESTION, "answer": text or "none", "answer_type": "free"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    out = tmp_path / "ours"
    main(["import", str(tmp_path / "checkpoint_3"), str(out), "--base", str(tmp_path / "base"), "--num_thoughts", "4"])
    words = ["--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "eval"), "--eval_samples", "1"]
    main(["eval", str(out), *words, "--max_answer_tokens", str(WRITTEN)])
    greedy = json.loads((tmp_path / "eval/records.jsonl").read_text().splitlines()[0])
    assert greedy["text"].endswith(text) and greedy["thoughts"] == 4


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_such_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model, _ = base(tmp_path / "base", LLAMA)
    base(tmp_path / "deeper", {**LLAMA, "num_hidden_layers": 3})
    module = trained(Codi(model, "llama", norm=False))
    state = module.state_dict()
    files = {
        "other": ({"layers.0.weight": torch.zeros(1)}, "are of none of the known layouts: codi.*"),
        "plain": ([1, 2], "holds no weights by their names"),
        "code": (print, "cannot be read as weights alone"),
        "no_norm": (state, "prj_no_ln has no place here"),
        "strange": ({**state, "gate.weight": torch.zeros(1)}, "1 weights of unknown use: gate.weight"),
        "cut": ({k: w for k, w in state.items() if ".layers.1.self_attn.k_proj" not in k}, "lacks base_model.model."),
        "rows": ({k: w[:-1] if "embed" in k or "lm_head" in k else w for k, w in state.items()}, "leads to 20"),
    }
    for name, (value, _) in files.items():
        torch.save(value, tmp_path / name)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    cases = [(name, message, "base") for name, (_, message) in files.items()]
    cases += [
        ("broken.safetensors", "cannot be read as weights alone", "base"),
        ("gone", "no such checkpoint", "base"),
    ]
    cases += [
        ("cut", "lacks", "deeper"),
        ("deeper", "are of none", "base"),
        (".", "holds no checkpoint: neither", "base"),
    ]
    for name, message, of in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(["import", str(tmp_path / name), str(tmp_path / "ours"), "--base", str(tmp_path / of)])
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and message in told[0], told
        assert not (tmp_path / "ours").exists()
