"""GRPO and PPO with rollouts by vLLM: weights pushed, densities compared, TRL's correction, and equality with TRL."""

from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from soft_models import LATENT, build
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.ppo import SoftPPOTrainer

TOKENS = replace(LATENT, thought="token", thought_k=1, num_thoughts=0, answer_prompt="", max_answer_tokens=6)


def config(folder, **values):
    return GRPOConfig(
        **{
            "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": "none", "logging_steps": 1,
            "per_device_train_batch_size": 8, "num_generations": 4, "max_steps": 3, "learning_rate": 1e-2,
            "gradient_checkpointing": False, "disable_dropout": True, "save_strategy": "no", "disable_tqdm": True,
            "seed": 0, "lr_scheduler_type": "constant", "use_vllm": True, "vllm_mode": "colocate",
            "vllm_max_model_length": 96, **values,
        }
    )  # fmt: skip


def odd_reward(completions, **kwargs):
    return [sum(ord(c) for c in text) % 5 + 0.1 * len(text) for text in completions]


def dataset():
    return Dataset.from_list([{"prompt": f"{i}+{i}=?", "id": str(i)} for i in range(8)])


class Keep(TrainerCallback):
    def __init__(self):
        self.logs, self.gradients = [], []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(dict(logs))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def trainer(folder, tmp_path, thinking, cls=SoftGRPOTrainer, model=None, **values):
    more = {name: values.pop(name) for name in ("ratio", "peft_config") if name in values}
    made = cls(
        model or str(folder), odd_reward, config(tmp_path / "out", **values), dataset(), thinking=thinking, **more
    )
    keep = Keep()
    made.add_callback(keep)
    return made, keep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build("llama", tmp_path_factory.mktemp("train") / "model", spread=1.0)[1]


def test_a_run_of_20_steps_has_no_gap(folder, tmp_path):
    run, keep = trainer(folder, tmp_path, LATENT, max_steps=20, learning_rate=1e-3)
    run.train()
    assert len(keep.logs) == 20
    assert max(log["rollout/density_gap"] for log in keep.logs) < 1e-4
    assert keep.logs[-1]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)


def test_a_push_left_out_ends_the_run(folder, tmp_path):
    run, _ = trainer(folder, tmp_path, LATENT, max_steps=4, ratio="joint")
    push, pushes = run._vllm.sync_weights, []

    def sometimes():
        pushes.append(1)
        if len(pushes) != 3:
            push()

    run._vllm.sync_weights = sometimes
    with pytest.raises(ValueError, match="right after the weights were pushed to vLLM"):
        run.train()
    assert len(pushes) == 3


@pytest.mark.parametrize("ratio", ["top1", "factored", "conditional", "pathwise"])
def test_every_ratio(folder, tmp_path, ratio):
    more = {"vllm_importance_sampling_correction": False} if ratio == "factored" else {}
    run, keep = trainer(folder, tmp_path, LATENT, max_steps=2, ratio=ratio, **more)
    run.train()
    assert max(log["rollout/density_gap"] for log in keep.logs) < 1e-3


def test_an_adapter_and_ppo(tmp_path):
    """Merged for the push, and apart again; a head that is the embeddings; single rows of them that are trained."""
    folder = build("llama", tmp_path / "tied", spread=1.0, tie_word_embeddings=True)[1]
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=[3, 4])
    run, keep = trainer(folder, tmp_path / "lora", LATENT, peft_config=lora)
    run.train()
    assert max(log["rollout/density_gap"] for log in keep.logs) < 1e-4
    assert not any(getattr(m, "merged_adapters", None) for m in run.model.modules())
    run, keep = trainer(folder, tmp_path / "ppo", LATENT, SoftPPOTrainer)
    run.train()
    assert max(log["rollout/density_gap"] for log in keep.logs) < 1e-4


@pytest.mark.parametrize("mode", ["token_truncate", "sequence_mask"])
def test_k_1_is_trl_with_vllm(folder, tmp_path, mode):
    """The same completions, and log-probabilities of vLLM's that are a little off: the same loss and gradients."""
    folder = shutil.copytree(folder, tmp_path / "plain")
    (folder / "rl_soft.json").unlink()  # a plain language model
    values = {
        "vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.05, "max_steps": 1,
        "max_completion_length": TOKENS.max_answer_tokens, "beta": 0.0,
    }  # fmt: skip
    ours, kept = trainer(folder, tmp_path / "ours", TOKENS, **values)
    inner, made = ours._vllm.rollout, {}

    def off(prompt_ids, seeds):
        out = inner(prompt_ids, seeds)
        noise = 0.1 * torch.randn(out.log_probs.shape, generator=torch.Generator().manual_seed(0))
        shift = noise * out.action_mask
        shifted = replace(
            out, log_probs=out.log_probs + shift, support_log_probs=out.support_log_probs + shift[..., None]
        )
        for ids, row, logps, n in zip(
            prompt_ids, out.completion_ids.tolist(), shifted.log_probs.tolist(), out.lengths.tolist(), strict=True
        ):
            made.setdefault(tuple(ids), []).append((row[:n], logps[:n]))
        return shifted

    ours._vllm.rollout = off
    from rl_soft.train.runtime import guards

    limit, guards.MAX_DENSITY_GAP = guards.MAX_DENSITY_GAP, 10.0
    try:
        ours.train()
    finally:
        guards.MAX_DENSITY_GAP = limit

    class Theirs(GRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return ours._get_train_sampler(dataset)

        def _generate(self, prompts):
            out = list(super()._generate(prompts))
            out[2] = [[0, *[1] * (len(ids) - 1)] for ids in out[1]]  # <eot> is fed, not sampled
            return tuple(out)

        def _tokenize_prompts(self, prompts):
            return [ours.layout.prompt_ids(p) for p in prompts], None, {}

    args = config(tmp_path / "theirs", **values)
    args.use_vllm = False
    theirs = Theirs(str(folder), odd_reward, args, dataset(), processing_class=ours.processing_class)
    keep = Keep()
    theirs.add_callback(keep)

    def generate(prompts, **kwargs):
        turn, rows = {}, []
        for ids in prompts:
            i = turn[tuple(ids)] = turn.get(tuple(ids), -1) + 1
            rows.append(made[tuple(ids)][i])
        return prompts, [ids for ids, _ in rows], [[[x] for x in logps] for _, logps in rows], None

    theirs.use_vllm, theirs._last_loaded_step = True, -1
    theirs.vllm_generation = SimpleNamespace(sync_weights=lambda: None, generate=generate)
    theirs.train()
    assert kept.logs[0]["loss"] == pytest.approx(keep.logs[0]["loss"], abs=1e-5)
    for name, gradient in keep.gradients[0].items():
        assert (kept.gradients[0][name] - gradient).abs().max() < 1e-5, name
    name = "sampling/importance_sampling_ratio/mean"
    assert kept.logs[0][name] == pytest.approx(keep.logs[0][name], abs=1e-5)
    assert keep.logs[0][name] != pytest.approx(1, abs=1e-3)


def test_what_cannot_be(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction: ratio factored has two factors"):
        trainer(folder, tmp_path, LATENT, ratio="factored")
    with pytest.raises(ValueError, match="vllm_mode server"):
        trainer(folder, tmp_path, LATENT, vllm_mode="server")
    with pytest.raises(ValueError, match="vllm_structured_outputs_regex is not available"):
        trainer(folder, tmp_path, LATENT, vllm_structured_outputs_regex="a")
    with pytest.raises(ValueError, match="vllm_max_model_length is not available: it is read with use_vllm true"):
        trainer(folder, tmp_path, LATENT, use_vllm=False)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER is 0"):
        trainer(folder, tmp_path, LATENT)
