"""Adapters of every kind: what is evaluated, and what training starts from, is the adapter that was saved.

pytest tests/model/test_adapters.py
"""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import tiny_policy
from test_kl import soft_trainer, train

from rl_soft.cli.opening import load_policy as open_policy
from rl_soft.config.commands import EvaluationArguments
from rl_soft.model import policy
from rl_soft.model.folder import base_of

IDS = torch.arange(5, 19)[None]  # (1, 14)


def lora(*targets: str, **values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=list(targets), **values)


IA3 = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"])
# name -> (the base's embeddings and head are one matrix, the adapter, whether an evaluation may merge it)
KINDS: dict[str, tuple[bool, Any, bool]] = {
    "lora": (True, lora("o_proj", "down_proj"), True),
    "dora": (True, lora("o_proj", use_dora=True), True),
    "rank stabilised": (True, lora("o_proj", use_rslora=True), True),
    "embeddings": (True, lora("o_proj", "embed_tokens"), False),
    "embeddings, untied": (False, lora("o_proj", "embed_tokens"), True),
    "head": (True, lora("o_proj", "lm_head"), False),
    "head, untied": (False, lora("o_proj", "lm_head"), True),
    "head and tokens": (True, lora("o_proj", "lm_head", trainable_token_indices={"embed_tokens": [5, 6]}), False),
    "both ends": (True, lora("embed_tokens", "lm_head"), False),
    "both ends, untied": (False, lora("embed_tokens", "lm_head"), True),
    "both ends, tied": (True, lora("embed_tokens", ensure_weight_tying=True), False),
    "bias": (True, lora("o_proj", lora_bias=True), False),
    "whole embeddings": (True, lora("o_proj", modules_to_save=["embed_tokens"]), True),
    "whole head": (True, lora("o_proj", modules_to_save=["lm_head"]), True),
    "whole ends": (True, lora("o_proj", modules_to_save=["embed_tokens", "lm_head"]), True),
    "whole embeddings, untied": (False, lora("o_proj", modules_to_save=["embed_tokens"]), True),
    "tokens": (True, lora("o_proj", trainable_token_indices={"embed_tokens": [5, 6]}), True),
    "tokens, untied": (False, lora("o_proj", trainable_token_indices={"embed_tokens": [5, 6]}), True),
    "ia3": (True, IA3, True),
    "loha": (True, peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj"]), True),
    "vera": (True, peft.VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["o_proj"]), True),
}  # fmt: skip
ON_THE_HEAD = {kind for kind in KINDS if kind.startswith(("head", "both ends"))}  # which TRL refuses to train
REFUSED = {
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    "adaption prompt": peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=4, adapter_layers=1),
    "activated": lora("o_proj", alora_invocation_tokens=[5]),
}


def saved(folder: Path, tied: bool, config: Any) -> tuple[Path, Any]:
    """The folder of a trained adapter beside its base, and the model as it was when it was saved."""
    made = tiny_policy(tied=tied)
    policy_folder = folder / "base"
    made.model.save_pretrained(policy_folder)
    made.tokenizer.save_pretrained(policy_folder)
    model = peft.get_peft_model(policy.load_policy(str(policy_folder)).model, config)
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.5 * torch.randn(p.shape, generator=generator)
    model.save_pretrained(folder / "adapter")
    return folder / "adapter", model.eval()


@torch.no_grad()
def log_probs(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float().log_softmax(-1)  # (1, 14, V)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_evaluated_is_what_was_saved(tmp_path: Path, kind: str) -> None:
    tied, config, mergeable = KINDS[kind]
    folder, trained = saved(tmp_path, tied, config)
    arguments = EvaluationArguments(model_name_or_path="x", output_dir="o", dataset="d")
    opened = open_policy(str(folder), arguments).model
    assert (log_probs(opened) - log_probs(trained)).abs().max() < 1e-4
    assert isinstance(opened, peft.PeftModel) != mergeable
    base = policy.load_policy(str(tmp_path / "base")).model
    assert (log_probs(base) - log_probs(trained)).abs().max() > 1e-2, "the adapter does something"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ON_THE_HEAD])
def test_the_reference_of_an_adapter_is_the_start_that_it_had(tmp_path: Path, kind: str) -> None:
    """The KL of the first step is 0, and then it is not: the copy does not train along."""
    tied, config, _ = KINDS[kind]
    folder, _ = saved(tmp_path, tied, config)
    made = policy.load_policy(str(folder), trainable=True)
    start = log_probs(made.model)
    logs = train(soft_trainer(tmp_path / "run", made=made, beta=0.1, max_steps=3, learning_rate=3e-2))
    assert abs(logs[0]["kl"]) < 1e-7
    assert logs[-1]["kl"] > 1e-6
    assert all(log["rollout/density_gap"] < 1e-3 for log in logs if "rollout/density_gap" in log)
    assert (log_probs(made.model) - start).abs().max() > 1e-3
    made.model.set_adapter("ref")
    assert (log_probs(made.model) - start).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(ON_THE_HEAD))
def test_training_refuses_an_adapter_on_the_head(tmp_path: Path, kind: str) -> None:
    folder, _ = saved(tmp_path, *KINDS[kind][:2])
    with pytest.raises(ValueError, match="the model's default adapter is on its head, which TRL does not train"):
        soft_trainer(tmp_path / "run", made=policy.load_policy(str(folder), trainable=True), beta=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (lora("o_proj", bias="all"), "bias 'all'"),
        (lora("o_proj", bias="lora_only"), "bias 'lora_only'"),
        (peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["o_proj"], total_step=10), "ADALORA"),
    ],
)
def test_an_adapter_that_has_no_copy_is_trained_without_a_reference(tmp_path: Path, config: Any, kind: str) -> None:
    folder, _ = saved(tmp_path, True, config)
    with pytest.raises(ValueError, match=f"beta 0.1: .* no second adapter with {kind}; set beta 0"):
        soft_trainer(tmp_path / "run", made=policy.load_policy(str(folder), trainable=True), beta=0.1)
    logs = train(soft_trainer(tmp_path / "run", made=policy.load_policy(str(folder), trainable=True), max_steps=1))
    assert logs[0]["rollout/density_gap"] < 1e-3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_outside_of_the_layers_is_refused_by_its_folder(tmp_path: Path, kind: str) -> None:
    folder, model = saved(tmp_path, True, REFUSED[kind])
    with pytest.raises(ValueError, match=rf"{folder} is a [A-Z_]+ adapter, .*such as LORA and IA3"):
        policy.load_policy(str(folder))
    made = policy.load_policy(str(tmp_path / "base"))
    with pytest.raises(ValueError, match=r"default is a [A-Z_]+ adapter"):
        soft_trainer(tmp_path / "run", made=policy.Policy(model, made.tokenizer, None))
    with pytest.raises(ValueError, match=r"peft_config is a [A-Z_]+ adapter"):
        soft_trainer(tmp_path / "run", made=made, peft_config=REFUSED[kind])


# Its base


def test_a_relative_base_is_looked_for_from_here_and_then_from_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, trained = saved(tmp_path, True, lora("o_proj"))
    settings = json.loads((folder / "adapter_config.json").read_text())

    def name(base: str) -> None:
        (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": base}))

    (tmp_path / "elsewhere").mkdir()
    for base, here in (("../base", "elsewhere"), ("base", "."), ("inner", "elsewhere")):
        if base == "inner":
            shutil.copytree(tmp_path / "base", folder / "inner")
        name(base)
        monkeypatch.chdir(tmp_path / here)
        opened = policy.load_policy(str(folder))
        assert torch.equal(log_probs(opened.model), log_probs(trained))
        opened.model.save_pretrained(tmp_path / "elsewhere/again")
        assert base_of(tmp_path / "elsewhere/again") in (base, str((folder / base).resolve()))
    for base in ("../gone", "/gone/base", "models/gone", "a/b/c"):
        name(base)
        with pytest.raises(ValueError, match=rf"adapter {folder}: its base {base} does not exist"):
            policy.load_policy(str(folder))
    name("owner/gone")
    for _ in ("without a tokenizer", "with one"):
        with pytest.raises(ValueError, match=rf"adapter {folder}: its base owner/gone cannot be loaded"):
            policy.load_policy(str(folder))
        shutil.copy(tmp_path / "base/tokenizer.json", folder)
        shutil.copy(tmp_path / "base/tokenizer_config.json", folder)


def test_an_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, True, lora("o_proj"))
    assert not list(folder.glob("tokenizer*"))
    base = policy.load_policy(str(tmp_path / "base")).tokenizer
    assert policy.load_policy(str(folder)).tokenizer.get_vocab() == base.get_vocab()


def test_an_adapter_of_another_model_is_refused_by_both_names(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path, True, lora("o_proj"))
    made = tiny_policy()
    made.model.config.hidden_size = 48
    wide = type(made.model)(made.model.config)
    wide.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=rf"adapter {folder} does not fit its base .*base: size mismatch"):
        policy.load_policy(str(folder))
