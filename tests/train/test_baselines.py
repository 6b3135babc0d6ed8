"""The methods that CODI is compared with: what they feed, what they count as loss, how they resume.

pytest tests/train/test_baselines.py
"""

import json
import logging
import math
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, TINY, rows, tiny_policy
from safetensors.torch import load_file
from transformers import TrainingArguments

from rl_soft.config.arguments import CoconutArguments, ICoTArguments
from rl_soft.config.recipe import load_recipe
from rl_soft.data import sources as data
from rl_soft.evaluation.records import GREEDY
from rl_soft.evaluation.samples import sample_records
from rl_soft.model import policy
from rl_soft.model.policy import eos_token_ids
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import pipeline as train
from rl_soft.train import supervised
from rl_soft.train.coconut import CoconutTrainer, Curriculum
from rl_soft.train.icot import ICoTTrainer, Removal
from rl_soft.train.sft import example
from rl_soft.train.supervised import IGNORE, reset_optimizer, usable_rows

EXPLICIT = {
    "thought": "token", "phase": "explicit", "num_thoughts": 24, "end_of_thinking": "#", "step_separator": ";",
    "max_answer_tokens": 3,
}  # fmt: skip
LATENT = {
    "thought": "hidden", "phase": "latent", "num_thoughts": 4, "answer_prompt": "#", "step_separator": ";",
    "max_answer_tokens": 3,
}  # fmt: skip


def arguments(folder):
    return TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        per_device_train_batch_size=4,
    )


def icot(folder, **values):
    made = tiny_policy()
    layout = Layout(Thinking(**EXPLICIT), made.tokenizer)
    return ICoTTrainer(
        made.model, arguments(folder), layout=layout, arguments=ICoTArguments(**values), rows=rows(16), seed=0
    )


def coconut(folder, model_type="llama", **values):
    made = tiny_policy(model_type)
    layout = Layout(Thinking(**LATENT), made.tokenizer)
    return CoconutTrainer(
        made.model, arguments(folder), layout=layout, arguments=CoconutArguments(**values), rows=rows(16), seed=0
    )


def text_of(layout, ids):
    return layout.tokenizer.decode([i for i in ids if i != layout.tokenizer.pad_token_id])


# -- SFT -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worked_steps", [True, False])
def test_sft_learns_what_follows_the_question(worked_steps):
    layout = Layout(Thinking(**EXPLICIT), tiny_policy().tokenizer)
    row = rows(4)[3]
    made = example(layout, row, worked_steps)
    chain = "".join(step + ";" for step in row.steps) if worked_steps else ""
    assert text_of(layout, made["input_ids"]) == f"{row.question}{chain}#{row.answer}<eos>"
    learned = [i for i in made["labels"] if i != IGNORE]
    assert text_of(layout, learned) == f"{chain}#{row.answer}<eos>"


# -- iCoT ----------------------------------------------------------------------------------------------------------


def test_icot_starts_as_cot_and_ends_as_no_cot(tmp_path):
    """Before the first removal its sequences are those of CoT-SFT, after the last those of No-CoT-SFT."""
    trainer = icot(tmp_path, cot_epochs=1, remove_per_epoch=4, removal_smoothing=None)
    for step, worked_steps in ((0, True), (10**4, False)):
        batch = trainer.batch(rows(8), step)
        for i, row in enumerate(rows(8)):
            expected = example(trainer.layout, row, worked_steps)
            width = len(expected["input_ids"])
            assert batch["input_ids"][i, :width].tolist() == expected["input_ids"]
            assert batch["labels"][i, :width].tolist() == expected["labels"]
            assert (batch["labels"][i, width:] == IGNORE).all() and batch["attention_mask"][i].sum() == width


def test_icot_removes_from_the_left_one_token_at_a_time(tmp_path):
    trainer = icot(tmp_path, cot_epochs=0, remove_per_epoch=4, removal_smoothing=None)  # 4 steps an epoch
    row = rows(4)[3]
    chain = "".join(step + ";" for step in row.steps)
    for step in range(6):
        batch = trainer.batch([row], step)
        assert (
            text_of(trainer.layout, batch["input_ids"][0].tolist())
            == f"{row.question}{chain[step:]}#{row.answer}<eos>"
        )


def test_the_removal_schedule():
    removal = Removal(ICoTArguments(cot_epochs=2, remove_per_epoch=5, remove_all_beyond=7), 10, longest=40)
    assert [removal(step) for step in (0, 19, 20, 22, 23, 24, 33)] == [0, 0, 0, 1, 1, 2, 6]
    assert removal(34) == 40, "beyond the threshold the rest goes at once"
    assert Removal(ICoTArguments(remove_per_epoch=5), 10, longest=4)(10**6) == 4


def test_removal_smoothing_has_the_distribution_of_the_paper(tmp_path):
    smoothing = 0.7
    trainer = icot(tmp_path, removal_smoothing=smoothing)
    extra = torch.tensor([trainer.extra_removal(rows(16), step) for step in range(500)]).flatten().double()
    for o in range(4):
        share, expected = (extra == o).double().mean(), (1 - math.exp(-smoothing)) * math.exp(-smoothing * o)
        assert share == pytest.approx(expected, abs=4 * math.sqrt(expected / len(extra))), o
    assert trainer.extra_removal(rows(16), 3) == trainer.extra_removal(rows(16), 3), (
        "addressed, so a resume repeats it"
    )


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam])
def test_a_reset_optimizer_is_a_fresh_one(optimizer):
    def step(used, parameter, gradient):
        parameter.grad = gradient.clone()
        used.step()

    parameter = torch.nn.Parameter(torch.ones(5))
    used = optimizer([parameter], lr=0.1)
    for _ in range(3):
        step(used, parameter, torch.randn(5))
    reset_optimizer(used)
    twin = torch.nn.Parameter(parameter.detach().clone())
    fresh, gradient = optimizer([twin], lr=0.1), torch.randn(5)
    step(used, parameter, gradient)
    step(fresh, twin, gradient)
    assert torch.equal(parameter, twin)


# -- Coconut -------------------------------------------------------------------------------------------------------


def test_the_curriculum():
    curriculum = Curriculum(CoconutArguments(cot_epochs=2, epochs_per_stage=3), 10, last=2)
    assert [curriculum(step) for step in (0, 19, 20, 49, 50, 79, 80, 10**6)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_stage_replaces_its_steps_and_learns_the_rest(tmp_path):
    trainer = coconut(tmp_path)
    row = rows(4)[3]  # 4 steps, more than stages
    for stage, left in ((0, row.steps), (1, row.steps[1:]), (2, row.steps[2:]), (3, ())):
        logits, labels = trainer.forward(trainer.model, [row], stage)
        chain = "".join(step + ";" for step in left)
        learned = [i for i in labels[0].tolist() if i != IGNORE]
        assert text_of(trainer.layout, learned) == f"{chain}#{row.answer}<eos>"
        assert logits.shape[:2] == labels.shape


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_row_of_coconut_is_the_same_alone_and_in_a_batch(tmp_path, model_type):
    trainer = coconut(tmp_path, model_type)
    trainer.model.eval()
    for stage in (0, 1, 3):
        logits, labels = trainer.forward(trainer.model, rows(8), stage)
        for i, row in enumerate(rows(8)):
            alone, own = trainer.forward(trainer.model, [row], stage)
            width = own.shape[1]
            assert torch.equal(labels[i, :width], own[0])
            torch.testing.assert_close(logits[i, :width], alone[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_batch_of_mixed_stages_has_the_mean_of_its_tokens(tmp_path):
    trainer = coconut(tmp_path, uniform_prob=1.0)
    trainer.model.eval()
    stages = trainer.stages(rows(8), 0)
    assert len(set(stages)) > 1 and all(0 <= s <= len(r.steps) for s, r in zip(stages, rows(8), strict=True))
    loss, count = 0.0, 0
    for row, stage in zip(rows(8), stages, strict=True):
        logits, labels = trainer.forward(trainer.model, [row], stage)
        n = int((labels[:, 1:] != IGNORE).sum())
        loss += float(torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORE)) * n
        count += n
    assert float(trainer.compute_loss(trainer.model, {"rows": rows(8)})) == pytest.approx(loss / count, rel=1e-5)


def test_the_answer_reaches_every_thought_of_coconut(tmp_path):
    trainer, seen = coconut(tmp_path), []

    def remember(module, args, kwargs, output):
        if kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"].retain_grad()
            seen.append(kwargs["inputs_embeds"])

    trainer.model.register_forward_hook(remember, with_kwargs=True)
    logits, _ = trainer.forward(trainer.model, rows(2), 3)
    logits[:, 1].logsumexp(-1).sum().backward()
    assert len(seen) == 4 and all(x.grad.abs().max() > 0 for x in seen)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_coconut_is_evaluated_as_it_was_trained(tmp_path, model_type):
    """The last stage's log-probabilities are those of the latent rollout, which decodes on its own cache."""
    trainer = coconut(tmp_path, model_type)
    trainer.model.eval()
    prompts = [trainer.layout.prompt_ids(row.question) for row in rows(6)]
    ends = eos_token_ids(trainer.model, trainer.layout.tokenizer)
    out = rollout(trainer.model, trainer.layout, prompts, None, ends)
    assert (out.thought_mask.sum(-1) == 4).all()
    for i, row in enumerate(rows(6)):
        written = out.completion_ids[i][out.action_mask[i] & ~out.thought_mask[i]]
        answer = trainer.layout.tokenizer.decode(written[:1])
        logits, _ = trainer.forward(trainer.model, [replaced(row, answer)], 3)
        at = len(trainer.layout.forced_after_cap)
        expected = torch.log_softmax(logits[0, at - 1], -1)[written[0]]
        first = out.log_probs[i][out.action_mask[i] & ~out.thought_mask[i]][0]
        torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-5)


def replaced(row, answer):
    from dataclasses import replace

    return replace(row, answer=answer)


# -- whole runs ----------------------------------------------------------------------------------------------------

RUN = {
    "model_config": {**TINY, "model_type": "llama", "tie_word_embeddings": True}, "vocabulary": "0123456789+-=;#",
    "dataset": "chain_sum", "train_size": 40, "learning_rate": 1e-2, "disable_tqdm": True, "seed": 3,
    "dataset_options": {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True},
    "per_device_train_batch_size": 8, "validation_every": 2, "validation_problems": 8, "eval_problems": 4,
    "max_steps": 4,
}  # fmt: skip
METHODS = {  # four steps an epoch; removals and stages begin within the four steps, and the resume is at one of them
    "sft": EXPLICIT | {"worked_steps": True},
    "icot": EXPLICIT | {"cot_epochs": 0.25, "remove_per_epoch": 4, "removal_smoothing": 1.0},
    "coconut": LATENT | {"cot_epochs": 0.25, "epochs_per_stage": 0.25, "thoughts_per_step": 2, "uniform_prob": 0.3},
}


def recipe(folder, method, **values):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    given = {**RUN, **METHODS[method], "method": method, "output_dir": str(folder / "run"), **values}
    path.write_text(yaml.safe_dump(given))
    return load_recipe(path)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    for m in lines:
        m.pop("num_tokens", None)  # TRL counts them from the last start
    return {m["step"]: m for m in lines if "loss" in m}


@pytest.mark.parametrize("method", METHODS)
def test_four_steps_are_two_a_resume_and_two(tmp_path, method, monkeypatch):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train.run(recipe(whole, method, save_steps=2))
    step_end = train.Interrupt.on_step_end

    def interrupted(self, args, state, control, **kwargs):
        self.asked = state.global_step == 2
        return step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(train.Interrupt, "on_step_end", interrupted)
        with pytest.raises(SystemExit):
            train.run(recipe(halves, method, save_steps=2))
    assert sorted(metrics(halves)) == [1, 2] and not (halves / "run/model").exists()
    train.run(recipe(halves, method, save_steps=2))
    assert metrics(whole) == metrics(halves) and sorted(metrics(whole)) == [1, 2, 3, 4]
    a, b = (load_file(folder / "run/model/model.safetensors") for folder in (whole, halves))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    progress = {"icot": ("removed_tokens", [0, 0, 1, 2]), "coconut": ("stage", [0, 1, 2, 3])}
    if method in progress:
        name, expected = progress[method]
        assert [m[name] for _, m in sorted(metrics(whole).items())] == expected


@pytest.mark.parametrize("method,at", [("icot", [2, 3]), ("coconut", [1, 2, 3])])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_optimizer_is_reset_once_at_each_removal_and_each_stage(tmp_path, method, at, accumulation, monkeypatch):
    resets, steps = [], []
    step_begin = train.Interrupt.on_step_begin

    def counted(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        return step_begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(train.Interrupt, "on_step_begin", counted)
    monkeypatch.setattr(supervised, "reset_optimizer", lambda optimizer: resets.append(steps[-1]))
    values = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
    train.run(recipe(tmp_path, method, **values))
    assert resets == at


CODI = LATENT | {"thought": "gumbel", "thought_k": 3, "beta": 0.0}  # KD divides by a std of the micro-batch


@pytest.mark.parametrize("method", [*METHODS, "codi"])
def test_sixteen_rows_at_once_are_four_times_four(tmp_path, method, monkeypatch):
    """One step of SGD moves the weights alike, though answers and steps differ in length."""
    monkeypatch.setitem(METHODS, "codi", CODI)
    values = {"optim": "sgd", "max_grad_norm": 0.0, "max_steps": 1, "validation_problems": 0, "learning_rate": 0.1}
    moved = []
    for size in (16, 4):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 16 // size}
        run = train.run(recipe(tmp_path / str(size), method, **values, **batch))
        moved.append(load_file(run / "model/model.safetensors"))
    at_once, accumulated = moved
    for name, weight in at_once.items():
        torch.testing.assert_close(accumulated[name], weight, atol=1e-7, rtol=1e-5, msg=name)


@pytest.mark.parametrize("method", ["sft", "icot", "coconut"])
def test_an_adapter_is_trained_saved_and_loaded(tmp_path, method):
    start = tiny_policy()
    base = tmp_path / "base"
    start.model.save_pretrained(base)
    start.tokenizer.save_pretrained(base)
    given = {"model_config": None, "vocabulary": None, "model_name_or_path": str(base), "use_peft": True, "lora_r": 4}
    run = train.run(recipe(tmp_path, method, max_steps=2, **given))
    assert (run / "model/adapter_model.safetensors").exists()
    loaded = policy.load_policy(str(run / "model"))
    for name, weight in start.model.named_parameters():
        inside = dict(loaded.model.get_base_model().named_parameters())
        same = inside.get(name, inside.get(f"{name.removesuffix('.weight')}.base_layer.weight"))
        if same is not None:
            assert torch.equal(same, weight), "the base stays as it is"
    rows_of = {
        name: tensor for name, tensor in load_file(run / "model/adapter_model.safetensors").items() if "lora_B" in name
    }
    assert rows_of and all(tensor.abs().max() > 0 for tensor in rows_of.values())
    layout = Layout(loaded.thinking, loaded.tokenizer)
    assert sample_records(loaded.model.eval(), layout, [(row, GREEDY) for row in rows(4)], seed=0)


def test_a_checkpoint_answers_in_a_fresh_process(tmp_path):
    """`rl-soft eval` of a Coconut model in another process gives the greedy answers of this one."""
    run = train.run(recipe(tmp_path, "coconut", max_steps=1))
    options = json.dumps(RUN["dataset_options"])
    words = ["eval", str(run / "model"), "--dataset=chain_sum", f"--dataset_options={options}", "--eval_problems=6"]
    command = [sys.executable, "-m", "rl_soft", *words, "--eval_samples=1", f"--output_dir={tmp_path / 'eval'}"]
    subprocess.run(command, check=True, timeout=120, cwd=ROOT, capture_output=True)
    records = [json.loads(line) for line in (tmp_path / "eval/records.jsonl").read_text().splitlines()]
    texts = {r["problem_id"]: r["text"] for r in records if r["sample"] == GREEDY}
    loaded = policy.load_policy(str(run / "model"))
    problems = data.load_rows("chain_sum", "evaluation", 6, 2, RUN["dataset_options"])
    tasks = [(row, GREEDY) for row in problems]
    ours = sample_records(loaded.model.eval(), Layout(loaded.thinking, loaded.tokenizer), tasks, seed=7)
    assert texts == {r["problem_id"]: r["text"] for r in ours}


@pytest.mark.parametrize("method", METHODS)
def test_the_saved_folder_is_evaluated_by_its_own_layout(tmp_path, method):
    run = train.run(recipe(tmp_path, method, max_steps=1))
    loaded = policy.load_policy(str(run / "model"))
    assert loaded.thinking == load_recipe(tmp_path / "recipe.yaml").thinking
    layout = Layout(loaded.thinking, loaded.tokenizer)
    records = sample_records(loaded.model.eval(), layout, [(row, GREEDY) for row in rows(4)], seed=0)
    assert {r["outcome"] for r in records} <= {"correct", "wrong", "unparsed"}
    if method == "coconut":
        assert all(r["thoughts"] == 4 for r in records)


# -- bad input -----------------------------------------------------------------------------------------------------


def test_unusual_rows_are_counted_or_refused_by_name(caplog):
    from dataclasses import replace

    layout = Layout(Thinking(**EXPLICIT), tiny_policy().tokenizer)
    some = rows(8)
    bare = [replace(row, steps=()) if i in (2, 5) else row for i, row in enumerate(some)]
    with caplog.at_level(logging.INFO, "rl_soft"):
        assert usable_rows(bare, layout, 128, None, True, "d") == bare
    assert "2 of 8 rows have no steps" in caplog.text and "sum/2" in caplog.text
    with pytest.raises(ValueError, match="dataset d has no worked steps"):
        usable_rows([replace(row, steps=()) for row in some], layout, 128, None, True, "d")
    assert usable_rows([replace(row, steps=()) for row in some], layout, 128, None, False, "d")
    with pytest.raises(ValueError, match=r"dataset d, row sum/\d: \d+ tokens .* the model has 20 positions"):
        usable_rows(some, layout, 20, None, True, "d")
    caplog.clear()
    with caplog.at_level(logging.INFO, "rl_soft"):
        kept = usable_rows(some, layout, 20, 20, True, "d")
    assert 0 < len(kept) < 8 and f"{8 - len(kept)} of 8 rows are longer than max_row_tokens 20" in caplog.text
    with pytest.raises(ValueError, match="no row has at most max_row_tokens = 2"):
        usable_rows(some, layout, 20, 2, True, "d")
    caplog.clear()
    with caplog.at_level(logging.INFO, "rl_soft"):
        assert usable_rows(some, layout, 128, None, True, "d", drop_last_step=True) == some
    single = sum(len(row.steps) == 1 for row in some)
    assert single and f"{single} of 8 rows have one step, which drop_last_step leaves out, so" in caplog.text


@pytest.mark.parametrize(
    "method,values,message",
    [
        ("sft", {"phase": "latent"}, "method sft trains phase explicit with thought token"),
        ("coconut", {"thought": "gumbel"}, "method coconut trains phase latent with thought hidden"),
        ("coconut", {"num_thoughts": 5}, r"num_thoughts must be a multiple of thoughts_per_step \(2\)"),
        ("coconut", {"uniform_prob": 1.5}, "uniform_prob must be between 0 and 1"),
        ("icot", {"remove_per_epoch": 0}, "remove_per_epoch must be above 0"),
        ("sft", {"max_length": 64}, "max_length is derived from max_row_tokens"),
        ("sft", {"worked_step": True}, "did you mean worked_steps"),
        ("sft", {"use_peft": True}, "use_peft: an adapter's folder names its base model by path"),
        ("icot", {"use_peft": True}, "use_peft: an adapter's folder names its base model by path"),
        ("icot", {"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1, got 1.0"),
        ("icot", {"eval_dataset_columns": {"question": "q"}}, "names no eval_dataset; .* take dataset_columns"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, method, values, message):
    with pytest.raises(ValueError, match=message):
        recipe(tmp_path, method, **values)


def test_coconut_refuses_gradient_checkpointing(tmp_path):
    with pytest.raises(ValueError, match="gradient_checkpointing is not available for coconut"):
        train.run(recipe(tmp_path, "coconut", gradient_checkpointing=True))
