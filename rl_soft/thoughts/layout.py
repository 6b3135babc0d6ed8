"""How a row becomes token ids: question, <bot>, thoughts, <eot>, answer prompt, answer.

Every part is tokenised on its own and the ids are joined, so that positions are lengths and never the result of a
search (CODI's released code finds the distilled position by matching strings; see docs/codi.md).

    latent    student   question <bot> z_1 .. z_n <eot> answer_prompt answer <eos>
              teacher   question steps answer_prompt answer <eos>
    explicit  prompt    chat template (system, question); thoughts until `end_of_thinking`, then the answer tokens
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from rl_soft.data.row import Row
from rl_soft.thoughts.end_of_thinking import EndOfThinking
from rl_soft.thoughts.thinking import Thinking, refuse_template_keys

logger = logging.getLogger("rl_soft")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOT, EOT, PAD = "<bot>", "<eot>", "<pad>"


class Layout:
    """Token ids of prompts and training rows for one tokenizer and one `Thinking`.

    Args:
        thinking: what a thought is, and the texts around the thoughts.
        tokenizer: the model's. In phase latent it has the tokens <bot> and <eot>. It takes the chat template of
            `thinking`, if that has one, and is saved with it.

    Attributes:
        bot_id, eot_id: ids of <bot> and <eot>; phase latent alone has them.
        end_ids: ids of the end of thinking; [] in phase latent.
        answer_prompt_ids: fed before the answer.
        forced_after_end, forced_after_cap: ids that are fed, not sampled, after thoughts that ended on their own, and
            after those that the cap ended.

    Raises:
        ValueError: latent phase with a tokenizer that lacks <bot> or <eot>; explicit phase with an end of thinking
            that encodes to no token.
    """

    def __init__(self, thinking: Thinking, tokenizer: PreTrainedTokenizerBase):
        self.thinking, self.tokenizer = thinking, tokenizer
        if thinking.chat_template is not None:
            tokenizer.chat_template = thinking.chat_template
        self.answer_prompt_ids = self.encode(thinking.answer_prompt)
        if thinking.phase == "latent":
            vocabulary = tokenizer.get_vocab()
            for token in (BOT, EOT):
                if token not in vocabulary:
                    raise ValueError(f"phase latent needs the token {token} in the tokenizer; use a CODI warm start")
            self.bot_id, self.eot_id = vocabulary[BOT], vocabulary[EOT]
            self.end_ids: list[int] = []
            self.end: EndOfThinking | None = None
            self.forced_after_cap = [self.eot_id, *self.answer_prompt_ids]
            self.forced_after_end = self.forced_after_cap
        else:
            self.end_ids = self.encode(thinking.end_of_thinking)
            if not self.end_ids:
                raise ValueError(f"end_of_thinking {thinking.end_of_thinking!r} encodes to no token")
            self.end = EndOfThinking.of(thinking.end_of_thinking, tokenizer)
            self.forced_after_cap = [*self.end_ids, *self.answer_prompt_ids]
            self.forced_after_end = self.answer_prompt_ids

    @property
    def max_completion_length(self) -> int:
        """The most positions of a completion: thoughts, what is forced, answer tokens."""
        return self.thinking.num_thoughts + len(self.forced_after_cap) + self.thinking.max_answer_tokens

    def encode(self, text: str) -> list[int]:
        """Ids of a text alone, without the tokenizer's special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []

    def question_ids(self, question: str | list[dict[str, Any]]) -> list[int]:
        """Ids of the question alone, with the chat template where the thinking is explicit and the model has one.

        Args:
            question: text, which goes into `question_template`; or chat messages, which are taken as they are.

        Raises:
            ValueError: chat messages in phase latent, or for a tokenizer without a chat template.
        """
        system, messages = self.thinking.system_prompt, question if isinstance(question, list) else []
        templated = self.thinking.phase == "explicit" and self.tokenizer.chat_template
        if messages and not templated:
            why = "the tokenizer has none" if self.thinking.phase == "explicit" else "phase latent takes none"
            raise ValueError(f"prompt {str(question)!r:.60} is chat messages, which need a chat template, and {why}")
        if isinstance(question, str):
            text = self.thinking.question_template.replace("{question}", question)
            if not templated:
                bos = self.tokenizer.bos_token_id
                return ([bos] if bos is not None else []) + self.encode(text)
            messages = [{"role": "user", "content": text}]
        if system is not None and messages[0].get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        told = {"add_generation_prompt": True, "tokenize": True, **(self.thinking.chat_template_kwargs or {})}
        template: Any = functools.partial(self.tokenizer.apply_chat_template, **told)
        try:
            ids: Any = template(messages)
        except TemplateError:
            if system != "":
                raise
            ids = template(messages[1:])  # a template without system turns: an empty one is none
        return list(ids["input_ids"])

    def prompt_ids(self, question: str | list[dict[str, Any]]) -> list[int]:
        """Everything before the first thought."""
        ids = self.question_ids(question)
        return [*ids, self.bot_id] if self.thinking.phase == "latent" else ids

    def answer_text(self, ids: Sequence[int]) -> str:
        """The text of a completion that is judged: in the explicit phase what stands behind the end of thinking.

        Args:
            ids: those of the completion, thoughts by their strongest ids. Where thinking was not ended, nothing is
                an answer.
        """
        rest = ""
        if self.end is not None:
            said = self.end.split(ids)
            if said is None:
                return ""
            n, rest = said
            ids = ids[n:]
        return rest + str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer and <eos>."""
        return [*self.encode(answer), self.tokenizer.eos_token_id]

    def steps_ids(self, row: Row, drop_last_step: bool) -> list[int]:
        """Ids of a worked solution, each step with `step_separator` after it."""
        steps = row.steps[:-1] if drop_last_step else row.steps
        return self.encode("".join(step + self.thinking.step_separator for step in steps))


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> Tensor:
    """Rows of ids, filled up to the longest with `value`, on the right or the left: (B, T) int64."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(r)) for r in rows]
    return torch.tensor([[*f, *r] if left else [*r, *f] for r, f in zip(rows, fill, strict=True)])


def check_texts(layout: Layout) -> None:
    """Refuse texts that could not do what they are there for.

    Raises:
        ValueError: an end of thinking that does not come back from its ids; a system prompt and no chat template that
            takes one; a chat template that cannot be read, or does not know a name of chat_template_kwargs.
    """
    thinking, tokenizer = layout.thinking, layout.tokenizer
    _check_template(layout)
    if thinking.system_prompt:
        try:
            layout.question_ids("?")
        except TemplateError as error:
            raise ValueError(
                f"system_prompt {thinking.system_prompt!r:.60}: the tokenizer's chat template says {str(error)!r}; "
                "write it into question_template"
            ) from None
    if thinking.phase != "explicit":
        return
    assert layout.end is not None
    if layout.end.split(layout.end_ids) is None:
        spelt = str(tokenizer.decode(layout.end_ids))
        raise ValueError(
            f"end_of_thinking {thinking.end_of_thinking!r} cannot be produced by this tokenizer, which reads "
            f"{spelt!r} for it: no thoughts would ever spell it"
        )
    if tokenizer.eos_token_id in layout.end_ids:
        raise ValueError(
            f"end_of_thinking {thinking.end_of_thinking!r} holds {tokenizer.eos_token!r}, which ends the completion: "
            "nothing could be answered after it"
        )


def _check_template(layout: Layout) -> None:
    """Raises ValueError for what asks for a chat template where none is used, or for one that does not do it."""
    thinking, tokenizer = layout.thinking, layout.tokenizer
    if not (thinking.phase == "explicit" and tokenizer.chat_template):
        why = "the tokenizer has none" if thinking.phase == "explicit" else "phase latent takes none"
        refuse_template_keys(thinking, why)
        return
    if thinking.chat_template is not None:
        try:
            layout.question_ids("?")
        except TemplateError as error:
            raise ValueError(f"chat_template {thinking.chat_template!r:.60} cannot be used: {error}") from None
    known = inspect.signature(tokenizer.apply_chat_template).parameters
    for name, value in (thinking.chat_template_kwargs or {}).items():
        if name in known or re.search(rf"\b{re.escape(name)}\b", str(tokenizer.chat_template)) is None:
            why = "is not for a recipe to say" if name in known else "is no name in the tokenizer's chat template"
            raise ValueError(f"chat_template_kwargs: {name} ({value!r:.40}) {why}; leave it out")


def tell_template(layout: Layout) -> None:
    """One line, where questions are asked plainly for want of a chat template."""
    if layout.thinking.phase == "explicit" and not layout.tokenizer.chat_template:
        logger.info("the tokenizer has no chat template: questions are asked as they stand in question_template")
