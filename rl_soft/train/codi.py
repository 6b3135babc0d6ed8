"""CODI: self-distil an explicit chain of thought into a few continuous thoughts (arXiv 2502.21074).

One model is teacher and student in the same step:

    teacher   question steps answer_prompt answer       cross-entropy on steps and answer         L_teacher
    student   question <bot> z_1 .. z_n <eot> answer_prompt answer
                                                        cross-entropy on the answer               L_student
    KD        at the position that predicts the first answer token, in every layer,               L_KD
              distance of h_student and sg[h_teacher], both divided by the layer's teacher std

    L = alpha L_student + beta L_KD + gamma L_teacher                                              (Eq. 5)

A thought z is the projected last hidden state (the paper's, thought hidden), a mixture of token embeddings (soft,
gumbel), or their gated sum (hybrid). One step costs 1 + n + 1 passes of the student and one of the teacher.

Where we differ from the released code: the distilled position comes from lengths; masks and position ids are right
under left padding, so a result does not depend on its batch; the teacher runs once, detached for the KD target; the
embedding layer, which has nothing to learn, is left out; states are normalised before the distance; <bot> and <eot>
are trained under LoRA too.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer
from transformers.cache_utils import DynamicCache

from rl_soft.config.arguments import CodiArguments
from rl_soft.config.recipe import Recipe, load_recipe
from rl_soft.config.refusals import refuse_checkpointing
from rl_soft.data import sources as data
from rl_soft.data.sources import Row
from rl_soft.model import policy
from rl_soft.model.devices import avoid_cudnn_attention
from rl_soft.model.projector import KeepsProjector, add_projector
from rl_soft.model.think import last_state, position_ids, think
from rl_soft.thoughts.layout import Layout, pad
from rl_soft.thoughts.noise import address
from rl_soft.train.runtime.checkpoints import divided
from rl_soft.train.start import lora_config, with_adapter
from rl_soft.train.supervised import IGNORE, WholeStep, token_cross_entropy

logger = logging.getLogger("rl_soft")


class CodiCollator:
    """Rows -> student prompt (left-padded), student answer and teacher sequence (right-padded), labels, positions.

    Args:
        kd_position: first: the states that predict the first answer token are distilled; answer: those of them all.
    """

    def __init__(self, layout: Layout, drop_last_step: bool, kd_position: str = "first"):
        self.layout, self.drop_last_step, self.kd_position = layout, drop_last_step, kd_position
        self.pad_id = layout.tokenizer.pad_token_id

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        layout, prefix = self.layout, self.layout.forced_after_cap  # <eot> and the answer prompt
        prompts, students, teachers, labels, student_labels, seeds = [], [], [], [], [], []
        kd: list[tuple[int, int, int]] = []  # row, position in its student's answer, position in its teacher
        for i, feature in enumerate(features):
            row: Row = feature["row"]
            question, answer = layout.question_ids(row.question), layout.answer_ids(row.answer)
            steps = layout.steps_ids(row, self.drop_last_step)
            lead = [*question, *steps, *layout.answer_prompt_ids]
            prompts.append(layout.prompt_ids(row.question))
            students.append([*prefix, *answer])
            student_labels.append([IGNORE] * len(prefix) + answer)
            teachers.append([*lead, *answer])
            labels.append([IGNORE] * len(question) + teachers[-1][len(question) :])
            for j in range(len(answer) if self.kd_position == "answer" else 1):
                kd.append((i, len(prefix) - 1 + j, len(lead) - 1 + j))  # the states there predict answer[j]
            seeds.append(feature["seed"])
        return {
            "prompt_ids": pad(prompts, self.pad_id, left=True),  # (B, P)
            "prompt_mask": pad([[1] * len(p) for p in prompts], 0, left=True),
            "student_ids": pad(students, self.pad_id),  # (B, S)
            "student_labels": pad(student_labels, IGNORE),
            "teacher_ids": pad(teachers, self.pad_id),  # (B, L)
            "teacher_mask": pad([[1] * len(t) for t in teachers], 0),
            "teacher_labels": pad(labels, IGNORE),
            "kd": torch.tensor(kd),  # (N, 3)
            "seeds": torch.tensor(seeds),  # (B,)
        }


def distillation_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], kind: str = "smooth_l1", as_released: bool = False
) -> Tensor:
    """Mean over layers, positions and width of the distance to sg[teacher]; tensors (N, H), one per layer.

    The std of the teacher's states is one number per layer, over positions and width, so that layers weigh alike.

    Args:
        kind: l1, |d|; smooth_l1, d^2 / 2 below 1 and |d| - 1/2 above.
        as_released: divide the distance by the std, as the released code does, instead of the states. For l1 this is
            the same. smooth_l1 is then quadratic and vanishing where states are small (docs/codi.md).
    """
    distance = {"l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}[kind]
    terms = []
    for s, t in zip(student, teacher, strict=True):
        s, t = s.float(), t.detach().float()
        std = t.std().clamp(min=1e-6)
        terms.append(distance(s, t) / std if as_released else distance(s / std, t / std))
    return torch.stack(terms).mean()


class CodiTrainer(KeepsProjector, WholeStep, Trainer):
    """transformers' Trainer with the CODI loss.

    Args:
        model: a causal LM, without a PEFT wrapper. Its tokenizer has <bot> and <eot>.
        args: transformers.TrainingArguments; columns are kept whatever `remove_unused_columns` says.
        layout: how a row becomes ids: the tokenizer, and a `Thinking` of phase latent.
        codi: the keys of method codi; their defaults where it is None.
        train_dataset: rows with worked solutions, made by `rl_soft.load_rows`.
        peft_config: a LoraConfig; None trains all weights. The rows of <bot> and <eot> are trained with the adapter
            and saved in it.
        **kwargs: other arguments of transformers' Trainer.

    Raises:
        ValueError: gradient checkpointing, LoRA on a model without a folder, KD layers that the model has not, or a
            separate teacher of another shape or vocabulary.

    Source: CODI, arXiv 2502.21074, Eq. 5; docs/codi.md says where this differs from the paper and its code.
    """

    model: Any
    args: Any

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        layout: Layout,
        codi: CodiArguments | None = None,
        train_dataset: Sequence[Row],
        peft_config: Any = None,
        **kwargs: Any,
    ):
        avoid_cudnn_attention()
        codi = codi or CodiArguments()
        args.remove_unused_columns, args.label_names = False, ["student_labels"]
        refuse_checkpointing(
            args,
            "gradient_checkpointing is not available for codi:",
            "lower per_device_train_batch_size instead",
        )
        self.layout, self.codi = layout, codi
        self.kd_layers = kd_layers(codi, model.config.get_text_config().num_hidden_layers)
        self.teacher = None if codi.teacher == "self" else separate_teacher(codi.teacher, model, layout, args)
        base = model
        if peft_config is not None:
            model = with_adapter(model, layout, peft_config)
        if layout.thinking.kind.reads_hidden and layout.thinking.num_thoughts and codi.use_projector:
            add_projector(
                base, layout.thinking.kind.mixes, codi.projector_size, args.seed, projector_dtype(base, args)
            )
        super().__init__(
            model,
            args,
            data_collator=CodiCollator(layout, codi.drop_last_step, codi.kd_position),
            train_dataset=CodiRows(train_dataset, args.seed),
            **kwargs,
        )
        self._parts: dict[str, list[Tensor]] = {}  # since the last log

    def counts(self, batch: dict[str, Any]) -> Tensor:
        """Labelled tokens of student and teacher, distilled positions."""
        labels = batch["student_labels"], batch["teacher_labels"]
        return torch.stack([*((x[:, 1:] != IGNORE).sum() for x in labels), torch.ones_like(batch["kd"][:, 0]).sum()])

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """alpha L_student + beta L_KD + gamma L_teacher, as a share of the whole optimizer step."""
        c, rows = self.codi, inputs["kd"][:, 0]
        of_student, of_teacher, of_kd = self.share(inputs, num_items_in_batch)
        # The student's pass comes last: from its output, DDP finds every parameter that is in use.
        teacher = self.run_teacher(model, inputs)
        student_logits, states = self.student(model, inputs)
        student_loss = token_cross_entropy(student_logits, inputs["student_labels"])
        loss, parts = c.alpha * of_student * student_loss, {"loss_student": student_loss}
        if c.beta:
            assert states is not None
            at_student = [states[i][rows, inputs["kd"][:, 1]] for i in self.kd_layers]  # (N, H) each
            at_teacher = [teacher.hidden_states[i][rows, inputs["kd"][:, 2]] for i in self.kd_layers]
            parts["loss_kd"] = distillation_loss(at_student, at_teacher, c.kd_loss, c.kd_as_released)
            loss = loss + c.beta * of_kd * parts["loss_kd"]
        if c.gamma and self.teacher is None:
            parts["loss_teacher"] = token_cross_entropy(teacher.logits, inputs["teacher_labels"])
            loss = loss + c.gamma * of_teacher * parts["loss_teacher"]
        for name, value in parts.items():
            self._parts.setdefault(name, []).append(value.detach())
        return (loss, {"logits": student_logits}) if return_outputs else loss

    def run_teacher(self, model: Any, inputs: dict[str, Tensor]) -> Any:
        """One pass over question, steps and answer, by this model or the frozen one; None where no loss reads it."""
        c = self.codi
        if not c.beta and not c.gamma:
            return None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.teacher is None):
            return (self.teacher or model)(
                input_ids=inputs["teacher_ids"],
                attention_mask=inputs["teacher_mask"],
                position_ids=position_ids(inputs["teacher_mask"]),
                output_hidden_states=bool(c.beta),
                use_cache=False,
            )

    def student(
        self, model: Any, inputs: dict[str, Tensor], control: str = "none"
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Question, n thoughts, answer: logits (B, S, V) and, with KD, the states (B, S, H) a layer of the last pass.

        1 + n + 1 forward passes on one cache, with gradients through all of them.
        """
        thinking = self.layout.thinking
        mask, cache = inputs["prompt_mask"], DynamicCache(config=self.model.config)
        out = model(
            input_ids=inputs["prompt_ids"],
            attention_mask=mask,
            position_ids=position_ids(mask),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_hidden_states=thinking.kind.reads_hidden,
        )
        seeds = inputs["seeds"] if self.codi.train_noise else None
        fresh = self.state.global_step * (thinking.num_thoughts + 1)  # new noise each time a row comes round
        mask, position, _ = think(
            model, self.model, out.logits[:, -1], last_state(out), cache, mask, thinking, seeds, fresh, control
        )
        S = inputs["student_ids"].shape[1]
        out = model(
            input_ids=inputs["student_ids"],
            attention_mask=torch.cat([mask, mask.new_ones(len(mask), S)], dim=1),
            position_ids=position + torch.arange(S, device=position.device),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=bool(self.codi.beta),
        )
        return out.logits, out.hidden_states

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of the loss's parts over the micro-batches of all processes since the last log."""
        if self._parts and "loss" in logs:
            means = torch.stack([torch.stack(values).mean() for values in self._parts.values()])
            logs.update(zip(self._parts, self.accelerator.reduce(means, "mean").tolist(), strict=True))
            self._parts = {}
        super().log(logs, *args, **kwargs)


def kd_layers(codi: CodiArguments, depth: int) -> list[int]:
    """Indices of the distilled hidden states; 0 is the embedding layer, `depth` the last. All but 0 by default."""
    layers = list(range(1, depth + 1)) if codi.kd_layers is None else codi.kd_layers
    for layer in layers:
        if not 0 <= layer <= depth:
            raise ValueError(f"kd_layers must be between 0 (embeddings) and {depth} (the last layer), got {layer}")
    return layers


def projector_dtype(model: Any, args: Any) -> torch.dtype:
    """float32, in any model; ZeRO-3 partitions parameters of one dtype only."""
    plugin = args.deepspeed_plugin
    return model.dtype if plugin is not None and plugin.zero_stage == 3 else torch.float32


def separate_teacher(source: str, model: Any, layout: Layout, args: Any) -> Any:
    """The frozen teacher of the paper's ablation: a model trained on worked solutions, from a folder or its recipe.

    Raises:
        ValueError: it is missing, its hidden states are not of the student's shape, or ids mean other tokens in it.
    """
    if divided(args) == 3:
        raise ValueError("teacher: a separate teacher is not available under ZeRO-3; use ZeRO-2 or teacher self")
    folder = source
    if source.endswith((".yaml", ".yml")):
        folder = str(load_recipe(source, {"seed": args.seed}).output_dir / "model")
    if not Path(folder).exists() and (folder != source or source.startswith((".", "/", "runs/", "models/"))):
        raise ValueError(f"teacher {source}: {folder} does not exist; train it first, or use teacher self")
    made = policy.load_policy(folder, str(model.dtype).removeprefix("torch."))
    ours, theirs = (m.config.get_text_config() for m in (model, made.model))
    for name in ("hidden_size", "num_hidden_layers"):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"teacher {source}: {name} is {getattr(theirs, name)}, the student's {getattr(ours, name)}; "
                "states are distilled one to one, so take a teacher of the same shape"
            )
    vocabulary = layout.tokenizer.get_vocab()
    other = {t for t, i in made.tokenizer.get_vocab().items() if vocabulary.get(t) != i}
    if other:
        raise ValueError(
            f"teacher {source}: {min(other)!r} has another id than in the student; use the same tokenizer"
        )
    return made.model.to(args.device).eval().requires_grad_(False)


class CodiRows(torch.utils.data.Dataset):
    """Rows with a seed each; the trainer's step is the other coordinate of their noise."""

    def __init__(self, rows: Sequence[Row], seed: int):
        self.items = [{"row": row, "seed": address(seed, row.id, 0)} for row in rows]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.items[i]


def codi_trainer(recipe: Recipe, start: policy.Policy, args: Any, layout: Layout, rows: list[data.Row]) -> Any:
    return CodiTrainer(
        start.model, args, layout=layout, codi=recipe.extra, train_dataset=rows, peft_config=lora_config(recipe)
    )
