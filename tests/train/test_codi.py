"""CODI: positions are lengths, padding changes nothing, the student learns through its thoughts.

pytest tests/train/test_codi.py
"""

from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY, VOCABULARY, rows, tiny_policy
from transformers import TrainingArguments

from rl_soft.config.arguments import CodiArguments
from rl_soft.config.recipe import load_recipe
from rl_soft.model import policy, think
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train.codi import IGNORE, CodiTrainer, distillation_loss

KINDS = ["hidden", "soft", "gumbel", "hybrid"]


def make(tmp_path, model_type="llama", thought="gumbel", made=None, peft_config=None, training=None, **codi):
    made = made or tiny_policy(model_type)
    thinking = Thinking(
        thought=thought, thought_k=0 if thought == "soft" else 3, num_thoughts=3, answer_prompt="#", step_separator=";"
    )
    layout = Layout(thinking, made.tokenizer)
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", remove_unused_columns=False, disable_tqdm=True,
        **{"save_strategy": "no", **(training or {})},
    )  # fmt: skip
    return CodiTrainer(
        made.model, args, layout=layout, codi=CodiArguments(**codi), train_dataset=rows(64),
        peft_config=peft_config,
    )  # fmt: skip


def batch_of(trainer, n):
    return trainer.data_collator([trainer.train_dataset[i] for i in range(n)])


@pytest.mark.parametrize("where", ["first", "answer"])
def test_both_streams_predict_the_answer_at_the_distilled_positions(tmp_path, where):
    trainer = make(tmp_path, kd_position=where, drop_last_step=False)
    batch, seen = batch_of(trainer, 8), {}
    for i, in_student, in_teacher in batch["kd"].tolist():
        token = batch["student_ids"][i, in_student + 1]
        assert token == batch["student_labels"][i, in_student + 1] == batch["teacher_ids"][i, in_teacher + 1]
        seen.setdefault(i, []).append(token.item())
    for i, row in enumerate(rows(8)):
        answer = trainer.layout.answer_ids(row.answer)
        assert seen[i] == (answer if where == "answer" else answer[:1])
        question = len(trainer.layout.question_ids(row.question))
        assert (batch["teacher_labels"][i, :question] == IGNORE).all()
        text = trainer.layout.tokenizer.decode(batch["teacher_ids"][i][batch["teacher_mask"][i].bool()])
        assert text == row.question + "".join(s + ";" for s in row.steps) + "#" + row.answer + "<eos>"


@pytest.mark.parametrize("thought", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_row_is_the_same_alone_and_among_64(tmp_path, model_type, thought):
    trainer = make(tmp_path, model_type, thought)
    trainer.model.eval()
    with torch.no_grad():
        logits, states = trainer.student(trainer.model, batch_of(trainer, 64))
        for i in range(0, 64, 5):
            alone = trainer.data_collator([trainer.train_dataset[i]])
            logits_i, states_i = trainer.student(trainer.model, alone)
            n = alone["student_ids"].shape[1]
            torch.testing.assert_close(logits[i, :n], logits_i[0], atol=1e-5, rtol=0)
            for together, single in zip(states, states_i, strict=True):
                torch.testing.assert_close(together[i, :n], single[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("values,expected", [({}, 2 + 3 + 1), ({"beta": 0.0, "gamma": 0.0}, 2 + 3)])
@pytest.mark.parametrize("thought", KINDS)
def test_a_step_costs_two_passes_more_than_thoughts_and_one(tmp_path, thought, values, expected):
    """Passes of the backbone, teacher included: 1 + (1 + n + 1). Without KD and teacher loss there is no teacher."""
    trainer = make(tmp_path, thought=thought, **values)
    passes = []
    trainer.model.base_model.register_forward_hook(lambda *_: passes.append(1))
    trainer.compute_loss(trainer.model, batch_of(trainer, 4)).backward()
    assert len(passes) == expected


@pytest.mark.parametrize("thought", KINDS)
def test_gradient_goes_through_the_thoughts(tmp_path, thought):
    """Every thought that is fed gets a gradient from the answer."""
    trainer = make(tmp_path, thought=thought)
    batch = batch_of(trainer, 1)
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
    own = dict(trainer.model.named_parameters())
    trained = [name for name in own if "projector" in name and own[name].requires_grad]
    assert all(own[name].grad.abs().max() > 0 for name in trained)
    assert len(trained) == {"hidden": 6, "hybrid": 7}.get(thought, 0)


def states(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 8, generator=generator).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("kind", ["l1", "smooth_l1"])
def test_teacher_is_detached_and_scale_does_not_matter(kind):
    student, teacher = states(0), states(1)
    loss = distillation_loss(student, teacher, kind)
    loss.backward()
    assert all(s.grad is not None for s in student)
    assert all(t.grad is None for t in teacher)
    assert distillation_loss(teacher, teacher, kind) == 0
    small = [[x / 50 for x in part] for part in (student, teacher)]
    torch.testing.assert_close(distillation_loss(*small, kind), loss)
    # As released, a smooth distance is quadratic, and so all but gone, where states are small.
    ratio = distillation_loss(*small, kind, True) / distillation_loss(student, teacher, kind, True)
    assert (ratio < 0.1) == (kind == "smooth_l1")
    assert kind == "smooth_l1" or ratio.item() == pytest.approx(1, rel=1e-5)


def test_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    trainer = make(tmp_path, alpha=0.5, beta=3.0, gamma=0.25)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, 4))
    parts = {k: v[-1].item() for k, v in trainer._parts.items()}
    expected = 0.5 * parts["loss_student"] + 3.0 * parts["loss_kd"] + 0.25 * parts["loss_teacher"]
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_layers_are_chosen_by_number(tmp_path):
    """The mean over all layers is the mean of each alone; a layer that is not there is refused."""
    made, losses = tiny_policy(), []
    for layers in ([1], [2], None):
        trainer = make(tmp_path, made=made, kd_layers=layers)
        trainer.compute_loss(trainer.model, batch_of(trainer, 4))
        losses.append(trainer._parts["loss_kd"][0].item())
    assert losses[2] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-5)
    with pytest.raises(ValueError, match=r"kd_layers must be between 0 \(embeddings\) and 2"):
        make(tmp_path, made=made, kd_layers=[3])


def test_a_separate_teacher_is_frozen_and_replaces_the_teacher_loss(tmp_path):
    teacher = tiny_policy(seed=1)
    teacher.model.save_pretrained(tmp_path / "teacher")
    teacher.tokenizer.save_pretrained(tmp_path / "teacher")
    trainer = make(tmp_path, teacher=str(tmp_path / "teacher"), thought="hidden")
    trainer.compute_loss(trainer.model, batch_of(trainer, 4)).backward()
    assert set(trainer._parts) == {"loss_student", "loss_kd"}
    assert not any(p.requires_grad for p in trainer.teacher.parameters())
    assert not any("teacher" in name for name in trainer.model.state_dict())
    itself = make(tmp_path, thought="hidden", gamma=0.0)
    itself.compute_loss(itself.model, batch_of(itself, 4))
    torch.testing.assert_close(itself._parts["loss_student"], trainer._parts["loss_student"])
    assert itself._parts["loss_kd"][0] != trainer._parts["loss_kd"][0]

    with pytest.raises(ValueError, match=r"recipe nowhere\.yaml does not exist"):
        make(tmp_path, teacher="nowhere.yaml")
    with pytest.raises(ValueError, match=r"teacher .*: num_hidden_layers is 2, the student's 3"):
        made = policy.make({**TINY, "num_hidden_layers": 3, "model_type": "llama"}, VOCABULARY, 0)
        make(tmp_path, made=made, teacher=str(tmp_path / "teacher"))


def test_without_a_projector_the_state_itself_is_fed(tmp_path):
    trainer = make(tmp_path, thought="hidden", use_projector=False)
    one, states = torch.zeros(4, 1, dtype=torch.long), torch.randn(4, 32)
    assert not any("projector" in name for name in trainer.model.state_dict())
    fed = think.thought_input(trainer.model, trainer.layout.thinking, one, torch.zeros(4, 1), states)
    assert torch.equal(fed, states)


@pytest.mark.parametrize(
    "values,message",
    [
        ({"kd_loss": "l2"}, "kd_loss must be one of l1, smooth_l1, got 'l2'"),
        ({"kd_position": "last"}, "kd_position must be one of first, answer, got 'last'"),
        ({"beta": -1.0}, r"beta must be at least 0, got -1\.0"),
        ({"kd_layers": []}, "kd_layers must be a list of whole numbers, not empty"),
        ({"projector_size": 0}, "projector_size must be at least 1, or null, got 0"),
        ({"teacher": "some/folder", "beta": 0.0}, "with beta 0 nothing is distilled from it"),
    ],
)
def test_options_out_of_range_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        CodiArguments(**values)


@pytest.mark.parametrize(
    "method,thought,more,message",
    [
        ("grpo", "hidden", {}, "thought hidden has no density .* use hybrid"),
        ("ppo", "soft", {}, "thought soft has no density"),
        ("codi", "token", {}, "codi trains phase latent .* got phase latent with thought token, which sft, icot"),
        (
            "codi",
            "soft",
            {"phase": "explicit", "end_of_thinking": "#"},
            "method codi trains phase latent with .* got phase explicit with thought soft",
        ),
        ("grpo", "hybrid", {"ratio": "conditional"}, "thought hybrid, which takes top1, joint or factored"),
        ("codi", "dirichlet", {}, "soft, gumbel, hidden or hybrid, got .* dirichlet, which grpo or ppo can train"),
        ("codi", "hybrid", {"use_projector": False}, "use_projector false: thought hybrid"),
    ],
)
def test_a_recipe_with_a_kind_that_its_method_cannot_train_is_refused(method, thought, more, message):
    recipe = {"codi": "codi", "grpo": "grpo_gumbel", "ppo": "ppo_gumbel"}[method]
    with pytest.raises(ValueError, match=message):
        load_recipe(ROOT / "recipes" / f"{recipe}.yaml", {"thought": thought, **more})


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
