"""The projector and the rows of <bot> and <eot> are in the folder: it comes back bit for bit, and opens elsewhere.

pytest tests/model/test_projector.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import tiny_policy
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_codi import batch_of, make
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rl_soft.model import policy, think
from rl_soft.model.projector import Projector, add_projector, load_projector
from rl_soft.model.side_modules import language_model, split_module
from rl_soft.thoughts.layout import BOT, EOT
from rl_soft.thoughts.thinking import CONTROLS, Thinking


def on_disk(folder, model_type="llama", tied=True):
    """A saved base model without <bot> and <eot>, as a hub has them: their rows must be added."""
    made = tiny_policy(model_type, tied)
    kept = [t for t in sorted(made.tokenizer.get_vocab(), key=made.tokenizer.get_vocab().get) if t not in (BOT, EOT)]
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({t: i for i, t in enumerate(kept)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", padding_side="left"
    )
    made.model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    made.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    start = policy.load_policy(str(folder))
    policy.add_thought_tokens(start)
    return start


def lora():
    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def outputs(trainer, model):
    """The student's and the teacher's logits of some rows, with another model in the trainer's place."""
    trainer.model, model = model, model.eval()
    batch = batch_of(trainer, 4)
    with torch.no_grad():
        return trainer.student(model, batch)[0], trainer.run_teacher(model, batch).logits


def test_it_draws_random_numbers_of_its_own():
    torch.manual_seed(3)
    expected, made = torch.rand(1), []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        model = tiny_policy().model
        torch.manual_seed(3)
        add_projector(model, gated=True, seed=seed)
        assert torch.rand(1) == expected
        made.append(model.projector.inner.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
def test_a_gate_starts_small_whatever_the_scale(model_type):
    """In a thought, the mixture of one embedding is a tenth as large as the state; the gate has a gradient."""
    model, hidden, ids = tiny_policy(model_type).model, torch.randn(20, 32), torch.arange(20)
    add_projector(model, gated=True, size=7)
    mixture = model.get_input_embeddings()(ids)
    alone, both = model.projector(hidden), model.projector(hidden, mixture)
    assert 0.09 < ((both - alone).norm() / alone.norm()).item() < 0.11
    both.square().sum().backward()
    assert model.projector.gate.grad.abs() > 0


def test_bfloat16_states_go_through_float32_weights():
    projector = Projector(8, 8)
    projector.draw(0)
    out = projector(torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


def test_a_state_dict_is_split_by_module_and_not_by_letters():
    state = dict.fromkeys(
        ("base_model.model.projector.gate", "projector.norm.bias", "model.multi_projector.w", "w"), 0
    )
    assert split_module(state, "projector") == ({"model.multi_projector.w": 0, "w": 0}, {"gate": 0, "norm.bias": 0})


def test_the_language_model_is_found_with_a_wrapper_and_without():
    made = tiny_policy().model
    wrapped = get_peft_model(made, lora())
    assert language_model(wrapped) is made and hasattr(made, "peft_config")
    assert language_model(made) is made


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
@pytest.mark.parametrize("thought,tied", [("hidden", True), ("hybrid", True), ("soft", True), ("soft", False)])
def test_a_folder_comes_back_bit_for_bit(tmp_path, thought, tied, peft_config):
    start = on_disk(tmp_path / "base", tied=tied)
    trainer = make(
        tmp_path / "run", thought=thought, made=start, peft_config=peft_config,
        training={"max_steps": 2, "learning_rate": 1e-2},
    )  # fmt: skip
    trainer.train()
    expected = outputs(trainer, trainer.model)
    policy.save(tmp_path / "model", trainer.save_model, start.tokenizer, trainer.layout.thinking, True)
    loaded = policy.load_policy(str(tmp_path / "model"))
    assert loaded.thinking == trainer.layout.thinking
    for ours, theirs in zip(expected, outputs(trainer, loaded.model), strict=True):
        assert torch.equal(ours, theirs)
    assert (tmp_path / "model" / "projector.safetensors").exists() == (thought != "soft")

    # As a plain model, which knows nothing of a projector, it gives the same worked solutions.
    if peft_config is None:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    else:
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        batch = batch_of(trainer, 4)
        assert torch.equal(expected[1], trainer.run_teacher(plain.eval(), batch).logits)


def test_an_adapter_trains_the_new_rows_alone_and_keeps_them(tmp_path):
    """They are in the adapter, so that it opens on a base whose new rows were drawn otherwise."""
    start = on_disk(tmp_path / "base")
    before = start.model.get_input_embeddings().weight.detach().clone()
    trainer = make(
        tmp_path / "run", thought="hidden", made=start, peft_config=lora(),
        training={"max_steps": 2, "learning_rate": 1e-2},
    )  # fmt: skip
    trainer.train()
    merged = trainer.model.merge_and_unload().get_input_embeddings().weight
    moved = (merged != before).any(-1).nonzero()[:, 0].tolist()
    assert moved == [trainer.layout.bot_id, trainer.layout.eot_id]

    trainer = make(tmp_path / "run", thought="hidden", made=on_disk(tmp_path / "base"), peft_config=lora(),
                   training={"max_steps": 2, "learning_rate": 1e-2})  # fmt: skip
    trainer.train()
    expected = outputs(trainer, trainer.model)
    policy.save(tmp_path / "model", trainer.save_model, start.tokenizer, trainer.layout.thinking, True)
    saved = load_file(tmp_path / "model" / "adapter_model.safetensors")
    assert {k: len(v) for k, v in saved.items() if "lora" not in k} == {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": 2
    }
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(99)
    base.resize_token_embeddings(len(AutoTokenizer.from_pretrained(tmp_path / "model")))
    opened = PeftModel.from_pretrained(base, tmp_path / "model")
    load_projector(opened.get_base_model(), tmp_path / "model")
    for ours, theirs in zip(expected, outputs(trainer, opened), strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("peft_config", [None, lora()], ids=["full", "lora"])
def test_two_steps_and_two_are_four(tmp_path, peft_config):
    values = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    runs = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-2")):
        trainer = make(tmp_path / "run", thought="hybrid", made=on_disk(tmp_path / "base"), peft_config=peft_config,
                       training=values)  # fmt: skip
        trainer.train(resume_from_checkpoint=resume)
        runs.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
    assert any("projector.gate" in name for name in runs[0])
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


def test_what_cannot_work_is_refused_by_name(tmp_path):
    made = tiny_policy()
    with pytest.raises(ValueError, match="use_peft: an adapter's folder names its base model by path"):
        make(tmp_path, made=made, peft_config=lora())
    with pytest.raises(ValueError, match="gradient_checkpointing is not available for codi"):
        make(tmp_path, made=made, training={"gradient_checkpointing": True})
    with pytest.raises(ValueError, match=r"has no projector\.safetensors"):
        load_projector(made.model, tmp_path)
    one = torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="thought hybrid needs a model with a projector"):
        think.thought_input(made.model, Thinking(thought="hybrid"), one, torch.zeros(1, 1), torch.zeros(1, 32))
    with pytest.raises(ValueError, match="phase must be latent for thought hidden"):
        replace(Thinking(thought="hidden"), phase="explicit", end_of_thinking="#")
    with pytest.raises(ValueError, match="control must be one of none, zero, shuffle, repeat, got 'zeros'"):
        think.disturb(torch.zeros(1, 2), "zeros", torch.zeros(1, 2))


@pytest.mark.parametrize("thought", ["hidden", "gumbel"])
def test_controls_take_the_content_of_thoughts_away(tmp_path, thought):
    """zero: no dependence on the thoughts' makers; shuffle: another row's; repeat: one thought, n times."""
    trainer = make(tmp_path, thought=thought)
    trainer.model.eval()
    fed = {}

    def remember(module, args, kwargs, output):
        if kwargs.get("inputs_embeds") is not None:
            fed.setdefault(control, []).append(kwargs["inputs_embeds"][:, 0])

    trainer.model.register_forward_hook(remember, with_kwargs=True)
    with torch.no_grad():
        for control in CONTROLS:
            trainer.student(trainer.model, batch_of(trainer, 4), control)
    assert all(len(x) == 3 for x in fed.values())
    assert all((x == 0).all() for x in fed["zero"])
    assert all(torch.equal(x, fed["none"][0]) for x in fed["repeat"])
    assert not torch.equal(fed["none"][1], fed["none"][0])
    assert torch.equal(fed["shuffle"][0], fed["none"][0][[3, 0, 1, 2]])
