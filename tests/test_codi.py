"""CODI: positions are lengths, padding changes nothing, the student learns through its thoughts.

pytest tests/test_codi.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import rows, tiny_policy
from transformers import TrainingArguments

from rl_soft.codi import IGNORE, CodiCollator, CodiRows, CodiTrainer, distillation_loss
from rl_soft.config import CodiArguments
from rl_soft.layout import Layout, Thinking


def make(tmp_path, model_type="llama", thought="gumbel", **codi):
    made = tiny_policy(model_type)
    thinking = Thinking(
        thought=thought, thought_k=0 if thought == "soft" else 3, num_thoughts=3, answer_prompt="#", step_separator=";"
    )
    layout = Layout(thinking, made.tokenizer)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False)
    return CodiTrainer(made.model, args, layout=layout, codi=CodiArguments(**codi), train_dataset=CodiRows(rows(8), 0))


def test_both_streams_predict_the_answer_at_the_distilled_position(tmp_path):
    trainer = make(tmp_path)
    batch = CodiCollator(trainer.layout, False)([trainer.train_dataset[i] for i in range(8)])
    at = len(trainer.layout.forced_after_cap) - 1
    for i, row in enumerate(rows(8)):
        first = trainer.layout.answer_ids(row.answer)[0]
        assert batch["student_ids"][i, at + 1] == first == batch["student_labels"][i, at + 1]
        assert batch["teacher_ids"][i, batch["teacher_positions"][i] + 1] == first
        question = len(trainer.layout.question_ids(row.question))
        assert (batch["teacher_labels"][i, :question] == IGNORE).all()
        text = trainer.layout.tokenizer.decode(batch["teacher_ids"][i][batch["teacher_mask"][i].bool()])
        assert text == row.question + "".join(s + ";" for s in row.steps) + "#" + row.answer + "<eos>"


@pytest.mark.parametrize("thought", ["gumbel", "soft"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_a_row_is_the_same_alone_and_in_a_batch(tmp_path, model_type, thought):
    trainer = make(tmp_path, model_type, thought)
    trainer.model.eval()
    items = [trainer.train_dataset[i] for i in range(8)]
    logits, states = trainer.student(trainer.model, trainer.data_collator(items))
    for i, item in enumerate(items):
        alone = trainer.data_collator([item])
        logits_i, states_i = trainer.student(trainer.model, alone)
        n = alone["student_ids"].shape[1]
        torch.testing.assert_close(logits[i, :n], logits_i[0], atol=1e-4, rtol=1e-4)
        for together, single in zip(states, states_i, strict=True):
            torch.testing.assert_close(together[i], single[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("thought", ["gumbel", "soft"])
def test_gradient_goes_through_the_thoughts(tmp_path, thought):
    """Every thought that is fed gets a gradient from the answer."""
    trainer = make(tmp_path, thought=thought)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    seen = []

    def remember(module, args, kwargs, output):
        if kwargs.get("inputs_embeds") is not None:
            kwargs["inputs_embeds"].retain_grad()
            seen.append(kwargs["inputs_embeds"])

    handle = trainer.model.register_forward_hook(remember, with_kwargs=True)
    trainer.student(trainer.model, batch)[0][:, 1, 3].sum().backward()
    handle.remove()
    assert len(seen) == 3
    assert all(x.grad.abs().max() > 0 for x in seen)


def test_teacher_is_detached_in_the_distillation_loss():
    student = tuple(torch.randn(4, 8, requires_grad=True) for _ in range(3))
    teacher = tuple(torch.randn(4, 8, requires_grad=True) for _ in range(3))
    distillation_loss(student, teacher).backward()
    assert student[1].grad is not None and student[2].grad is not None
    assert student[0].grad is None, "the embedding layer is left out"
    assert all(t.grad is None for t in teacher)
    assert distillation_loss(teacher, teacher) == 0
    scaled = [tuple(7 * x for x in states) for states in (student, teacher)]
    torch.testing.assert_close(distillation_loss(*scaled), distillation_loss(student, teacher))


def test_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    trainer = make(tmp_path, alpha=0.5, beta=3.0, gamma=0.25)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    loss = trainer.compute_loss(trainer.model, batch)
    parts = {k: v[-1] for k, v in trainer._parts.items()}
    expected = 0.5 * parts["loss_student"] + 3.0 * parts["loss_kd"] + 0.25 * parts["loss_teacher"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_dropping_the_last_step_leaves_the_others(tmp_path):
    trainer = make(tmp_path)
    row = rows(4)[3]
    kept, dropped = (trainer.layout.steps_ids(row, drop) for drop in (False, True))
    assert trainer.layout.tokenizer.decode(kept) == "".join(s + ";" for s in row.steps)
    assert trainer.layout.tokenizer.decode(dropped) == "".join(s + ";" for s in row.steps[:-1])


def test_a_latent_layout_needs_its_tokens():
    made = tiny_policy()
    made.tokenizer.get_vocab = lambda: {"a": 0}
    with pytest.raises(ValueError, match="phase latent needs the token <bot>"):
        Layout(Thinking(), made.tokenizer)
    with pytest.raises(ValueError, match="num_thoughts must be"):
        replace(Thinking(), num_thoughts=-1)
