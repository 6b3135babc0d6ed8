"""A model as an evaluation harness asks it: text in, text out, log-likelihoods of plain tokens.

What lm-eval and lighteval share (`lm_eval_model`, `lighteval_model`). Prompts are the harness's, and what surrounds
a thought is the model's own: its question template, its system message, its caps.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rl_soft.cli.generate import CAPS
from rl_soft.cli.plans import thinking_of
from rl_soft.config.recipe import load_command
from rl_soft.evaluation.generation import Completion, Task, complete, layout_for
from rl_soft.evaluation.records import GREEDY
from rl_soft.model import devices
from rl_soft.model.adapters import merged
from rl_soft.model.folder import model_folder, read_thinking
from rl_soft.model.policy import context_length, load_policy
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")

TAG = re.compile(r"\s*(</?\w+>|<\|[^|]*\|>)\s*")  # an end of thinking that is markup and no part of an answer


@dataclass(frozen=True)
class Asked:
    """One completion that a harness wants."""

    id: str  # addresses the noise, with `sample`
    prompt: str
    sample: int = 0
    greedy: bool = True
    temperature: float | None = None  # of thoughts and answer; None: the model's own
    stop: tuple[str, ...] = ()  # texts before which an answer ends


class HarnessLayout(Layout):
    """Prompts that a harness has made.

    Args:
        templated: they went through the chat template already.
    """

    def __init__(self, thinking: Thinking, tokenizer: Any, templated: bool) -> None:
        super().__init__(thinking, tokenizer)
        self.templated = templated

    def question_ids(self, question: str | list[dict[str, Any]]) -> list[int]:
        assert isinstance(question, str)
        if self.templated:
            return self.encode(question)
        text = self.thinking.question_template.replace("{question}", question)
        bos = self.tokenizer.bos_token_id
        return [*([] if bos is None else [bos]), *self.encode(text)]


class Harness:
    """A model on its device, and what a harness asks of it.

    Args:
        model: folder of ours, run, transformers or PEFT folder, or hub id.
        values: keys of `HarnessArguments`, `Thinking` and `Decoding`. Without caps, a model that is not ours has those
            of `rl-soft generate`.
        device: where it runs; None, or a GPU where there is none (lm-eval's default): what there is.

    Raises:
        Mistakes: keys that are none or do not fit.
        ValueError: a model that cannot be loaded; several processes.
    """

    def __init__(self, model: str, values: Mapping[str, Any], device: str | None = None) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("a harness runs rl_soft in one process; start it without a launcher")
        name = model_folder(model)
        arguments, changes, self.decoding = load_command("harness", name, dict(values))
        ours = read_thinking(Path(name)) is not None or changes.get("phase") == "latent"
        self.thinking = thinking_of(name, changes if ours else CAPS | changes)
        devices.set_up()
        dtype = arguments.dtype or devices.default_dtype()
        self.policy = load_policy(name, dtype, arguments.attn_implementation)
        if dtype == "float32":
            self.policy.model = merged(self.policy.model)
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = devices.device()
        self.model = self.policy.model.to(device).eval()
        self.tokenizer = self.policy.tokenizer
        self.seed, self.batch_size = arguments.seed, arguments.batch_size
        layout_for(self.model, self.tokenizer, self.thinking)
        self.templated = False

    @property
    def max_length(self) -> int:
        return context_length(self.model) or 2048

    def template(self, messages: Sequence[Mapping[str, str]], answers: bool = True) -> str:
        """Chat messages as text; the last of the user's goes into the model's question template.

        Args:
            answers: the assistant's turn begins behind them; else the last message is its unfinished one.

        Raises:
            ValueError: phase latent, whose models are trained without a chat template, or a tokenizer without one.
        """
        if self.thinking.phase == "latent" or not self.tokenizer.chat_template:
            why = "phase latent takes none" if self.thinking.phase == "latent" else "the tokenizer has none"
            raise ValueError(f"a chat template was asked for, and {why}; leave it out (--apply_chat_template)")
        made = [dict(message) for message in messages]
        last = max((i for i, m in enumerate(made) if m["role"] == "user"), default=None)
        if last is not None:
            made[last]["content"] = self.thinking.question_template.replace("{question}", made[last]["content"])
        if self.thinking.system_prompt and made[0]["role"] != "system":
            made.insert(0, {"role": "system", "content": self.thinking.system_prompt})
        self.templated = True
        return str(
            self.tokenizer.apply_chat_template(
                made,
                **(self.thinking.chat_template_kwargs or {}),
                tokenize=False,
                add_generation_prompt=answers,
                continue_final_message=not answers,
            )
        )

    def answers(self, asked: Sequence[Asked]) -> list[str]:
        """The text of each completion, without its thoughts, see `visible`.

        Raises:
            ValueError: a prompt that leaves the model no room; what the engine refuses.
        """
        alike: dict[Any, list[int]] = defaultdict(list)
        for i, one in enumerate(asked):
            alike[one.greedy, None if one.greedy else one.temperature].append(i)
        found: dict[int, str] = {}
        for (greedy, temperature), members in alike.items():
            thinking = self.thinking
            if temperature:
                thinking = replace(thinking, temperature=temperature, thought_temperature=temperature)
            layout = HarnessLayout(thinking, self.tokenizer, self.templated)
            tasks = [Task(asked[i].id, asked[i].prompt, GREEDY if greedy else asked[i].sample) for i in members]
            made: list[Completion] = []
            complete(self.model, layout, tasks, self.decoding, self.seed, self.batch_size, made.append)
            texts = (visible(layout, one) for one in made)
            found |= {i: cut(text, asked[i].stop) for i, text in zip(members, texts, strict=True)}
        return [found[i] for i in range(len(asked))]

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """ln p of each continuation given its context, as plain tokens, and whether each token is the most probable.

        Args:
            pairs: ids of (context, continuation); a context that is too long loses its beginning.

        Raises:
            ValueError: a kind of thought that is not discrete. What it would think before a continuation is random or
                unknown, so a continuation has no likelihood.
        """
        if not self.thinking.kind.discrete:
            raise ValueError(
                f"the task asks for log-likelihoods, and with thought {self.thinking.thought} an answer has none in "
                "closed form: it depends on the thoughts before it; choose a task that generates (output_type "
                "generate_until), or thought=token, which scores plain tokens without any thinking"
            )
        found: list[tuple[float, bool]] = []
        for start in range(0, len(pairs), self.batch_size):
            batch = pairs[start : start + self.batch_size]
            rows = [(context + continuation)[-self.max_length :] for context, continuation in batch]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.model.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.model.device)
            logits: Tensor = self.model(input_ids=ids, attention_mask=mask).logits.float()
            for row, scores, (_, continuation) in zip(rows, logits, batch, strict=True):
                last = len(row) - 1
                log_p = scores[last - len(continuation) : last].log_softmax(-1)  # (T, V)
                given = torch.tensor(continuation, device=log_p.device)
                total = log_p.gather(-1, given[:, None]).sum()
                found.append((float(total), bool((log_p.argmax(-1) == given).all())))
        return found


def visible(layout: Layout, done: Completion) -> str:
    """What is judged of a completion, behind the end of thinking where that is a text (`####`) and no tag."""
    end, text = layout.thinking.end_of_thinking, layout.answer_text(done.ids)
    return text if layout.end is None or TAG.fullmatch(end) or not text else end + text


def cut(text: str, stops: Iterable[str]) -> str:
    """The text before the first of `stops`; one in the white space that it begins with does not count."""
    start = len(text) - len(text.lstrip())
    places = [place for stop in stops if stop and (place := text.find(stop, start)) >= 0]
    return text[: min(places, default=len(text))]
