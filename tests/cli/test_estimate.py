"""`rl-soft estimate`: what it says before anything is loaded is what a run then takes.

pytest tests/cli/test_estimate.py
"""

import dataclasses

import pytest
import torch
from conftest import ROOT

from rl_soft import cli
from rl_soft.cli.estimate import estimate
from rl_soft.config.commands import EstimateArguments
from rl_soft.config.recipe import load_recipe, warm_start_of
from rl_soft.model.policy import add_thought_tokens, make
from rl_soft.model.scored_forward import SoftInputs, add_soft_forward
from rl_soft.rollouts import engine as engine
from rl_soft.rollouts.engine import Engine
from rl_soft.thoughts.layout import Layout

SPEEDS = (1e10, 1e10, 1e-5)
RECIPE = str(ROOT / "recipes/grpo_gumbel.yaml")
SMALL = {"prompts_per_step": 4, "num_generations": 4, "per_device_train_batch_size": 8}


def predict(overrides=None, **asked):
    recipe = load_recipe(RECIPE, {**SMALL, **(overrides or {})})
    return estimate(recipe, EstimateArguments(prompt_tokens=8, **asked), SPEEDS)


def test_memory_is_within_a_third_of_what_is_measured():
    recipe = load_recipe(RECIPE, SMALL)
    warm_start = warm_start_of(recipe)
    start = make(warm_start.model.model_config, warm_start.model.vocabulary, 0)
    add_thought_tokens(start)
    start.model.set_attn_implementation("float64")
    model, layout = start.model, Layout(recipe.thinking, start.tokenizer)
    told = predict()
    parameters = sum(p.numel() for p in model.parameters())
    assert told.parameters == parameters and told.always["weights"] == 4 * parameters

    prompts = [[*layout.question_ids("1+2+3="), layout.bot_id] for _ in range(16)]
    run = Engine(model, layout, prompts, torch.arange(16), [-1], None, "none")
    with torch.no_grad():
        run.enter()
        while run.live.stage[: run.n].ne(engine.DONE).all():
            run.step()
    cache = sum(x.numel() * 4 for layer in run.cache.layers for x in (layer.keys, layer.values))
    assert cache / 1.34 <= told.rollout["cache"] <= cache * 1.34
    out = run.walk.result(prompts)
    records = sum(
        x.numel() * x.element_size()
        for f in dataclasses.fields(out)
        if isinstance(x := getattr(out, f.name), torch.Tensor)
    )
    assert records / 1.34 <= told.rollout["records"] <= records * 1.34

    add_soft_forward(model)
    ids = torch.tensor(prompts[:8])
    ids[:, 0] = torch.arange(8) + 5  # on a CPU rows of one prompt would share it, and keep less
    mask = torch.cat([torch.ones_like(ids), out.mask[:8].long()], dim=1)
    recorded = (x[:8] for x in (out.support, out.log_weights, out.action_mask, out.thought_mask))
    kept, weights = {}, {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(x):
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(attention_mask=mask, soft=SoftInputs(ids, *recorded, recipe.thinking))
    activations = sum(x.untyped_storage().nbytes() for x in kept.values())
    assert activations / 1.34 <= told.update["activations"] <= activations * 1.34


def test_what_makes_it_smaller():
    plain = predict()
    assert predict({"use_peft": True}).trained < plain.trained
    lora = predict({"use_peft": True, "beta": 0.1})
    assert "reference model" not in lora.always and lora.always["gradients"] < plain.always["gradients"]
    assert predict({"beta": 0.1}).always["reference model"] == plain.always["weights"]
    states = lora.always["reference's states"]  # (rows, positions, H), of adapters too
    assert states == lora.rows * lora.completion_tokens * 4 * 128
    assert states == predict({"beta": 0.1}).always["reference's states"]
    assert "reference's states" not in plain.always
    assert predict({"gradient_checkpointing": True}).update["activations"] < 0.6 * plain.update["activations"]
    half = predict({"per_device_train_batch_size": 4}).update["activations"]
    assert half == pytest.approx(plain.update["activations"] / 2, rel=0.01)
    one, two, three = (predict(processes=2, zero=s).always for s in (1, 2, 3))
    optimizer = "optimizer (AdamW)"
    assert one[optimizer] == two[optimizer] == three[optimizer] == plain.always[optimizer] / 2
    assert one["gradients"] == plain.always["gradients"] == 2 * two["gradients"]
    assert two["weights"] == plain.always["weights"] == 2 * three["weights"]
    sharded = predict(processes=2, fsdp=True)
    assert sharded.always == three and sharded.rollout == predict(processes=2, zero=3).rollout
    half = predict({"dtype": "bfloat16"}, zero=1).always
    assert half["weights"] == plain.always["weights"] / 2
    assert half[optimizer] == 1.5 * plain.always[optimizer], "float32 copies of the weights, and two moments"
    assert predict(processes=2).rollout["cache"] == pytest.approx(plain.rollout["cache"] / 2)
    assert predict({"prompts_per_step": 8}).seconds["update"] == pytest.approx(2 * plain.seconds["update"])


def test_weights_of_4_bits_are_counted():
    lora, quantised, nested = (
        predict({"use_peft": True, **values}).always["weights"]
        for values in ({}, {"load_in_4bit": True}, {"load_in_4bit": True, "use_bnb_nested_quant": True})
    )
    linear = 3 * (4 * 128 * 128 + 3 * 128 * 384)  # weights of the layers
    assert lora - quantised == pytest.approx(linear * (4 - 0.5 - 4 / 64))
    assert quantised - nested == pytest.approx(linear * (4 - 1 - 4 / 256) / 64)


def test_the_command_says_what_does_not_fit_and_fails(capsys):
    command = ["estimate", RECIPE, "--prompt_tokens", "8"]
    cli.main([*command, "--memory", "8"])
    assert "fits in 8 GiB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--memory", "0.01", "--zero", "2", "--processes", "2"])
    text = capsys.readouterr().out
    assert stop.value.code == 1
    assert "does NOT fit in 0.01 GiB" in text and "2 process(es), ZeRO 2" in text
    assert "largest: activations" in text and "gradient_checkpointing true" in text


def test_bad_numbers_are_named(capsys):
    for arguments, message in {
        ("--zero", "-1"): "zero must be between 0 and 3, got -1",
        ("--processes", "0"): "processes must be at least 1, got 0",
        ("--memory", "much"): "memory must be a number, at least 0, or null, got 'much'",
        ("--zero", "3", "--fsdp"): "fsdp true and zero 3 both divide a model; take one of them",
        ("--processes", "3"): "completions do not divide over 3 processes",
    }.items():
        with pytest.raises(SystemExit) as stop:
            cli.main(["estimate", RECIPE, *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
