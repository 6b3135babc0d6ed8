"""`rl_soft.generate`: soft thinking with a causal language model as it is, from Python.

    completions = rl_soft.generate(model, tokenizer, ["What is 3 + 4?"], thinking=Thinking(...), samples=2)
    completions[0][1].answer

The engine, the layout and the noise are those of training and evaluation: a completion is addressed by (seed, prompt
id, sample), so neither its batch nor the other prompts change it. (The module is not called `generate`, for then
`rl_soft.generate` would be the module as soon as it is imported.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rl_soft.evaluation.records import GREEDY
from rl_soft.model.policy import context_length, evaluation_mode
from rl_soft.model.think import check_projector
from rl_soft.rollouts.engine import Rollout, rollout
from rl_soft.rollouts.engines import Roll
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout, check_texts, tell_template
from rl_soft.thoughts.noise import address
from rl_soft.thoughts.thinking import Thinking

logger = logging.getLogger("rl_soft")

TOP = 10  # entries of a thought that are returned


class Task(NamedTuple):
    """One completion to make; sample GREEDY is made without noise."""

    id: str
    question: str
    sample: int


@dataclass(frozen=True)
class Mixture:
    """One position: the strongest entries of what was fed to the model. A token is an entry of weight 1."""

    ids: list[int]  # at most TOP, the strongest first
    tokens: list[str]  # the text of each id alone
    weights: list[float]
    entropy: float  # nats, of the whole next-token distribution at its temperature
    outside: float  # probability under that distribution of all ids that are not mixed


@dataclass(frozen=True)
class Completion:
    """What a prompt led to."""

    prompt_id: str
    prompt: str
    sample: int  # -1: greedy
    thought_text: str  # the strongest ids of the thoughts
    answer: str  # the tokens after the thoughts and after what is fed behind them
    text: str  # all of it, as an evaluation judges it
    thoughts: list[Mixture]
    ids: list[int]  # of every position; latent thoughts hold <bot>
    answer_ids: list[int]
    thinking_end: str  # end: its text was said; cap: num_thoughts; cold: the cold stop; eos: end of text; failed
    finished: bool  # an end-of-text token came; else max_answer_tokens did, or logits that are not finite
    seed: int  # of its noise; 0 where there is none

    def to_dict(self) -> dict[str, Any]:
        """Name -> value, as JSON can hold them; thoughts are dicts, too."""
        return asdict(self)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    thinking: Thinking,
    decoding: Decoding | None = None,
    seed: int = 0,
    samples: int = 1,
    greedy: bool = False,
    batch_size: int = 16,
    ids: Sequence[str] | None = None,
) -> list[list[Completion]]:
    """Completions of each prompt.

    Args:
        model: a causal LM on its device, possibly in a PEFT wrapper; decoded in evaluation mode, left as it was.
        tokenizer: its tokenizer. One without a padding token takes its end of text for it.
        prompts: P questions; they go through `thinking.question_template` and the tokenizer's chat template.
        thinking: what a thought is, and the caps; phase explicit for a model that this package has not trained.
        decoding: cuts and cold stop; None for neither.
        seed: of the noise, with the prompt's id and the number of the sample.
        samples: completions of each prompt.
        greedy: no noise at all; one completion of each prompt.
        batch_size: completions decoded together; changes none of them.
        ids: P names that address the noise; the prompts' numbers "0", "1", .. if absent.

    Returns:
        P lists of `samples` completions.

    Raises:
        ValueError: a prompt that is empty or leaves the model no room, an end of thinking that the tokenizer cannot
            produce, thought_k over the vocabulary, a system prompt and no chat template that takes one, ids that are
            not P different ones, a model that the engine cannot decode.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of texts, got one text: [{prompts!r:.80}]")
    names = [str(i) for i in range(len(prompts))] if ids is None else [str(name) for name in ids]
    if len(names) != len(prompts) or len(set(names)) != len(names):
        raise ValueError(f"ids must be {len(prompts)} different names, one per prompt, got {names}")
    if samples < 1 or (greedy and samples > 1):
        raise ValueError(f"samples must be {'1 where greedy is true' if greedy else 'at least 1'}, got {samples}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    numbers = [GREEDY] if greedy else list(range(samples))
    tasks = [Task(name, text, n) for name, text in zip(names, prompts, strict=True) for n in numbers]
    layout = layout_for(model, tokenizer, thinking)
    tell_template(layout)
    found: list[Completion] = []
    complete(model, layout, tasks, decoding, seed, batch_size, found.append)
    return [found[i : i + len(numbers)] for i in range(0, len(found), len(numbers))]


def layout_for(model: Any, tokenizer: Any, thinking: Thinking) -> Layout:
    """The layout, once it is sure that model and tokenizer can do what `thinking` asks for.

    Raises:
        ValueError: see `generate`.
    """
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    thinking.support_size(model.config.get_text_config().vocab_size)
    check_projector(model, thinking)
    layout = Layout(thinking, tokenizer)
    check_texts(layout)
    return layout


def complete(
    model: Any,
    layout: Layout,
    tasks: Sequence[Task],
    decoding: Decoding | None,
    seed: int,
    batch_size: int,
    each: Callable[[Completion], None],
    stream: Callable[[str, Mixture], None] | None = None,
    roll: Roll = rollout,
) -> None:
    """Make the completions of `tasks`; arguments as in `generate`.

    Args:
        tasks: greedy ones or sampled ones, not both.
        each: is given each completion as soon as it and those before it are done.
        stream: is given every position of a batch's first task as it is made: its kind (thought, fed, answer) and
            what it is.
        roll: makes the rollouts.

    Raises:
        ValueError: a prompt that is empty or leaves the model no room; what `rollout` refuses.
    """
    questions = {task.id: task.question for task in tasks}
    prompts = {name: layout.prompt_ids(question) for name, question in questions.items()}
    check_room(prompts, layout, context_length(model))
    with evaluation_mode(model):
        for start in range(0, len(tasks), batch_size):
            batch = tasks[start : start + batch_size]
            reader = _Reader(layout, batch, seed, each, stream)
            seeds = None if batch[0].sample == GREEDY else torch.tensor(reader.seeds)
            ids = [prompts[task.id] for task in batch]
            roll(model, layout, ids, seeds, decoding=decoding, watch=reader.look)


def check_room(prompts: dict[str, list[int]], layout: Layout, context: int | None) -> None:
    """Raises ValueError for the first prompt that is empty or leaves a model without positions for what is to come."""
    for name, ids in prompts.items():
        if not ids:
            raise ValueError(f"prompt {name} is empty: it has no token that the first thought could be made from")
        if context is not None and len(ids) + layout.max_completion_length > context:
            raise ValueError(
                f"prompt {name} has {len(ids)} tokens; with up to {layout.max_completion_length} more of thoughts and "
                f"answer they are over the model's {context} positions: shorten it, or lower num_thoughts "
                f"({layout.thinking.num_thoughts}) or max_answer_tokens ({layout.thinking.max_answer_tokens})"
            )


class _Reader:
    """Makes completions of the records of a rollout while it is under way."""

    def __init__(
        self,
        layout: Layout,
        batch: Sequence[Task],
        seed: int,
        each: Callable[[Completion], None],
        stream: Callable[[str, Mixture], None] | None,
    ) -> None:
        self.layout, self.batch, self.each, self.stream = layout, batch, each, stream
        self.seeds = [0 if task.sample == GREEDY else address(seed, task.id, task.sample) for task in batch]
        self.given = 0  # completions
        self.streamed = 0  # positions of the first one
        self.text_of: dict[int, str] = {}

    def look(self, out: Rollout, done: Tensor) -> None:
        if self.stream is not None:
            for kind, mixture in self._positions(out, 0, self.streamed):
                self.stream(kind, mixture)
                self.streamed += 1
        finished = done.tolist()
        while self.given < len(self.batch) and finished[self.given]:
            self.each(self._completion(out, self.given))
            self.given += 1

    def _positions(self, out: Rollout, row: int, start: int = 0) -> list[tuple[str, Mixture]]:
        part = slice(start, int(out.mask[row].sum()))
        columns = (
            out.support[row, part, :TOP],
            out.log_weights[row, part, :TOP].exp(),  # the strongest first
            out.entropy[row, part],
            out.outside[row, part],
            out.thought_mask[row, part],
            out.action_mask[row, part],
        )
        made = []
        for ids, weight, entropy, outside, thought, action in zip(*(x.tolist() for x in columns), strict=True):
            n = max(1, sum(w > 0 for w in weight))
            weights = [round(w, 6) for w in weight[:n]]
            tokens = [self._text(i) for i in ids[:n]]
            mixture = Mixture(ids[:n], tokens, weights, round(entropy, 6) + 0.0, round(outside, 6))  # 0, never -0
            made.append(("thought" if thought else "answer" if action else "fed", mixture))
        return made

    def _completion(self, out: Rollout, row: int) -> Completion:
        task, positions = self.batch[row], self._positions(out, row)
        thoughts = [mixture for kind, mixture in positions if kind == "thought"]
        answer_ids = [mixture.ids[0] for kind, mixture in positions if kind == "answer"]
        ids = out.completion_ids[row, : len(positions)].tolist()
        return Completion(
            prompt_id=task.id,
            prompt=task.question,
            sample=task.sample,
            thought_text=self._decode([mixture.ids[0] for mixture in thoughts]),
            answer=self._decode(answer_ids),
            text=self._decode(ids),
            thoughts=thoughts,
            ids=ids,
            answer_ids=answer_ids,
            thinking_end=self._thinking_end(out, row, [mixture.ids[0] for mixture in thoughts], len(positions)),
            finished=bool(out.finished[row]),
            seed=self.seeds[row],
        )

    def _thinking_end(self, out: Rollout, row: int, strongest: list[int], length: int) -> str:
        n, end = len(strongest), self.layout.end
        if out.finished[row] and n == length:
            return "eos"
        if end is not None and end.split(strongest) is not None:
            return "end"
        if out.failed[row] and length <= n + 1:
            return "failed"
        return "cap" if n >= self.layout.thinking.num_thoughts else "cold"

    def _decode(self, ids: list[int]) -> str:
        return str(self.layout.tokenizer.decode(ids, skip_special_tokens=True))

    def _text(self, token: int) -> str:
        if token not in self.text_of:
            self.text_of[token] = str(self.layout.tokenizer.decode([token]))
        return self.text_of[token]
