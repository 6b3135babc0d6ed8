"""CODI: self-distil an explicit chain of thought into a few continuous thoughts (arXiv 2502.21074).

One model is teacher and student in the same step:

    teacher   question steps answer_prompt answer       cross-entropy on steps and answer         L_teacher
    student   question <bot> z_1 .. z_n <eot> answer    cross-entropy on the answer               L_student
    KD        at the position that predicts the first answer token, in every layer,               L_KD
              | h_student - sg[h_teacher] | averaged over the width, divided by the layer's teacher std

    L = alpha L_student + beta L_KD + gamma L_teacher                                              (Eq. 5)

Where we differ from the released code: thoughts are mixtures of token embeddings (kind soft or gumbel); the distilled
position comes from lengths; masks and position ids are right under left padding, so a result does not depend on its
batch; the teacher runs once, detached for the KD target; the embedding layer, which has nothing to learn, is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.cache_utils import DynamicCache

from rl_soft.config import CodiArguments
from rl_soft.data import Row
from rl_soft.layout import Layout
from rl_soft.noise import address
from rl_soft.policy import position_ids, think

IGNORE = -100


class CodiCollator:
    """Rows -> student prompt (left-padded), student answer and teacher sequence (right-padded), labels, positions."""

    def __init__(self, layout: Layout, drop_last_step: bool):
        self.layout, self.drop_last_step = layout, drop_last_step
        self.pad_id = layout.tokenizer.pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        layout, prefix = self.layout, self.layout.forced_after_cap  # <eot> and the answer prompt
        prompts, students, teachers, labels, student_labels, teacher_positions, seeds = [], [], [], [], [], [], []
        for feature in features:
            row: Row = feature["row"]
            question, answer = layout.question_ids(row.question), layout.answer_ids(row.answer)
            steps = layout.steps_ids(row, self.drop_last_step)
            lead = [*question, *steps, *layout.answer_prompt_ids]
            prompts.append(layout.prompt_ids(row.question))
            students.append([*prefix, *answer])
            student_labels.append([IGNORE] * len(prefix) + answer)
            teachers.append([*lead, *answer])
            labels.append([IGNORE] * len(question) + teachers[-1][len(question) :])
            teacher_positions.append(len(lead) - 1)  # the state there predicts the first answer token
            seeds.append(feature["seed"])
        return {
            "prompt_ids": pad(prompts, self.pad_id, left=True),  # (B, P)
            "prompt_mask": pad([[1] * len(p) for p in prompts], 0, left=True),
            "student_ids": pad(students, self.pad_id),  # (B, S)
            "student_labels": pad(student_labels, IGNORE),
            "teacher_ids": pad(teachers, self.pad_id),  # (B, L)
            "teacher_mask": pad([[1] * len(t) for t in teachers], 0),
            "teacher_labels": pad(labels, IGNORE),
            "teacher_positions": torch.tensor(teacher_positions),  # (B,)
            "seeds": torch.tensor(seeds),  # (B,)
        }


def pad(rows: list[list[int]], value: int, left: bool = False) -> Tensor:
    width = max(map(len, rows))
    fill = [[value] * (width - len(r)) for r in rows]
    return torch.tensor([f + r if left else r + f for r, f in zip(rows, fill, strict=True)])


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled positions; logits (B, T, V) at t predict labels (B, T) at t + 1."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def distillation_loss(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers of L1(student, sg[teacher]) / std(teacher); tensors (B, H), one a layer, embeddings left out.

    The std is one number a layer, over batch and width (released code), so that layers weigh alike.
    """
    terms = [
        (s.float() - t.detach().float()).abs().mean() / t.detach().float().std().clamp(min=1e-6)
        for s, t in zip(student[1:], teacher[1:], strict=True)
    ]
    return torch.stack(terms).mean()


class CodiTrainer(Trainer):
    """transformers' Trainer with the CODI loss."""

    model: Any

    def __init__(self, model: Any, args: Any, *, layout: Layout, codi: CodiArguments, **kwargs: Any):
        super().__init__(model, args, data_collator=CodiCollator(layout, codi.drop_last_step), **kwargs)
        self.layout, self.codi = layout, codi
        self.model_accepts_loss_kwargs = False  # the loss is a mean over this micro-batch
        self._parts: dict[str, list[float]] = {}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        student_logits, student_states = self.student(model, inputs)
        teacher = model(
            input_ids=inputs["teacher_ids"],
            attention_mask=inputs["teacher_mask"],
            position_ids=position_ids(inputs["teacher_mask"]),
            output_hidden_states=True,
            use_cache=False,
        )
        rows = torch.arange(len(inputs["teacher_ids"]), device=teacher.logits.device)
        teacher_states = tuple(h[rows, inputs["teacher_positions"]] for h in teacher.hidden_states)
        parts = {
            "loss_student": token_cross_entropy(student_logits, inputs["student_labels"]),
            "loss_kd": distillation_loss(student_states, teacher_states),
            "loss_teacher": token_cross_entropy(teacher.logits, inputs["teacher_labels"]),
        }
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value.item())
        c = self.codi
        loss = c.alpha * parts["loss_student"] + c.beta * parts["loss_kd"] + c.gamma * parts["loss_teacher"]
        return (loss, {"logits": student_logits}) if return_outputs else loss

    def student(self, model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Question, n thoughts, answer: logits (B, S, V) and the states (B, H) a layer at the distilled position.

        1 + n + 1 forward passes on one cache, with gradients through all of them.
        """
        thinking, embedding = self.layout.thinking, self.model.get_input_embeddings()
        mask, cache = inputs["prompt_mask"], DynamicCache(config=self.model.config)
        logits = model(
            input_ids=inputs["prompt_ids"],
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (B, V)
        seeds = inputs["seeds"] if self.codi.train_noise else None
        fresh = self.state.global_step * (thinking.num_thoughts + 1)  # new noise each time a row comes round
        mask, position = think(model, embedding, logits, cache, mask, thinking, seeds, fresh)
        S = inputs["student_ids"].shape[1]
        out = model(
            input_ids=inputs["student_ids"],
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), S)], dim=1),
            position_ids=position + torch.arange(S, device=position.device),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
        at = len(self.layout.forced_after_cap) - 1
        return out.logits, tuple(h[:, at] for h in out.hidden_states)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs.update({name: sum(v) / len(v) for name, v in self._parts.items() if v})
        self._parts = {}
        super().log(logs, *args, **kwargs)


class CodiRows(torch.utils.data.Dataset):
    """Rows with a seed each; the trainer's step is the other coordinate of their noise."""

    def __init__(self, rows: list[Row], seed: int):
        self.items = [{"row": row, "seed": address(seed, row.id, 0)} for row in rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.items[i]


class StopAtAccuracy(TrainerCallback):
    """Validate every few steps and stop the warm start before it saturates: RL needs something left to learn."""

    def __init__(self, validate: Callable[[], float], codi: CodiArguments):
        self.validate, self.codi = validate, codi
        self.trainer: CodiTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.codi.validation_every:
            return control
        accuracy = self.validate()
        assert self.trainer is not None
        self.trainer.log({"validation_accuracy": accuracy})
        if self.codi.stop_at_accuracy is not None and accuracy >= self.codi.stop_at_accuracy:
            control.should_training_stop = True
        return control
