"""`Thinking`: what a thought is and where it stands. It is saved beside the weights, which are trained for it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

from rl_soft.keys import Number, OneOf, either, fields, key, keys
from rl_soft.thoughts.kinds import KINDS, Kind

PHASES = ("latent", "explicit")
SWITCHES = ("none", "entropy", "gate")
CONTROLS = ("none", "zero", "shuffle", "repeat")  # what an analysis does to the thoughts, see `think.disturb`


@keys(frozen=True)
class Thinking:
    """What a thought is and where it stands; saved beside the weights, which are trained for one of these."""

    thought: Annotated[str, OneOf(KINDS)] = key(
        f"Thought kind. {'. '.join(f'{name}: {kind.help}' for name, kind in KINDS.items())}.", default="gumbel"
    )
    phase: Annotated[str, OneOf(PHASES)] = key(
        "latent: exactly num_thoughts between <bot> and <eot>; explicit: until end_of_thinking.", default="latent"
    )
    num_thoughts: int = key("Number of thoughts (latent), or the most before the answer (explicit).", default=6, ge=0)
    thought_k: int = key("K, the number of token ids that a thought mixes; 0 = the whole vocabulary.", default=4, ge=0)
    thought_tau: Number = key("Gumbel-Softmax temperature of the mixing weights.", default=0.5, gt=0)
    thought_gamma: Number = key(
        "dirichlet: total concentration; the weights come near the probabilities as it grows.", default=4.0, gt=0
    )
    thought_temperature: Number = key("T, which divides the logits before a thought is drawn.", default=1.0, gt=0)
    temperature: Number = key("Sampling temperature of the answer tokens.", default=1.0, gt=0)
    switch: Annotated[str, OneOf(SWITCHES)] = key(
        "explicit: which thoughts are soft, the others being tokens. none: all; entropy: where it rises "
        "(SwiReasoning); gate: as a learned gate draws it.",
        default="none",
    )
    switch_window: int = key("switch entropy: tokens in a row before a thought may be soft again.", default=512, ge=0)
    max_answer_tokens: int = key(
        "The most answer tokens with <eos>; then a completion is truncated.", default=16, ge=1
    )
    answer_prompt: str = key("Text fed before the answer, after the thoughts (not sampled, not trained).", default="")
    step_separator: str = key("Text after each step of a worked solution.", default="\n")
    end_of_thinking: str = key("explicit: text that ends the thinking once the strongest ids spell it.", default="")
    system_prompt: str | None = key(
        "System message (models with a chat template); null: the template's own; empty: an empty one, or none where "
        "the template takes none.",
        default=None,
    )
    question_template: str = key("Text of the question; must contain {question}.", default="{question}")
    chat_template: str | None = key("A Jinja text in the place of the tokenizer's chat template.", default=None)
    chat_template_kwargs: dict[str, Any] | None = key(
        "What the chat template is told, {enable_thinking: false} for example.", default=None
    )

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        if self.kind.reads_hidden and self.phase != "latent":
            refuse("phase", f"latent for thought {self.thought} (its thoughts spell no end of thinking)")
        if self.phase == "explicit" and self.num_thoughts < 1:
            refuse("num_thoughts", "at least 1 when phase is explicit")
        if self.kind.has_dirichlet_noise and self.thought_k == 1:
            refuse("thought_k", "0 or at least 2 for thought dirichlet (a single weight is certain)")
        if self.phase == "explicit" and not self.end_of_thinking:
            refuse("end_of_thinking", "a text when phase is explicit")
        if self.switch != "none" and self.phase != "explicit":
            refuse("switch", "none when phase is latent (its thoughts are never tokens)")
        if self.switch != "none" and (not self.kind.mixes or self.kind.has_dirichlet_noise):
            able = either([name for name, kind in KINDS.items() if kind.mixes and not kind.has_dirichlet_noise
                           and not kind.reads_hidden])  # fmt: skip
            refuse("switch", f"none for thought {self.thought}; thought {able} can be a token too")
        if self.switch != "none" and self.thought_k == 1:
            refuse("switch", "none when thought_k is 1 (every thought is a token)")
        if "{question}" not in self.question_template:
            refuse("question_template", "a text that contains {question}")

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True, default=str))

    @property
    def kind(self) -> Kind:
        """What is true of this kind of thought."""
        return KINDS[self.thought]

    @property
    def engines(self) -> tuple[str, ...]:
        """Names of `ENGINES` that can roll it out; vLLM has no gate."""
        return ("ours",) if self.switch == "gate" else self.kind.engines

    @property
    def mixing_tau(self) -> float:
        """What perturbed log-probabilities are divided by before they become log-weights; 1 for kinds without tau."""
        return self.thought_tau if self.kind.parameter == "thought_tau" else 1.0

    def support_size(self, vocab_size: int) -> int:
        """K for a model of `vocab_size` tokens; a hidden thought mixes none, and records its state's strongest id.

        Raises:
            ValueError: thought_k exceeds the vocabulary.
        """
        if self.thought_k > vocab_size:
            raise ValueError(f"thought_k must be at most the vocabulary size {vocab_size}, got {self.thought_k}")
        return (self.thought_k or vocab_size) if self.kind.mixes else 1

    def to_dict(self) -> dict[str, Any]:
        """Name -> value, as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Thinking:
        """Of `to_dict`; names that this version does not know are left out.

        Raises:
            ValueError: a value that is not allowed.
        """
        return cls(**{k: v for k, v in values.items() if k in fields(cls)})


def refuse_template_keys(thinking: Thinking, why: str) -> None:
    """Raises ValueError for keys that ask something of a chat template where none is used, because of `why`."""
    for name in ("system_prompt", "chat_template", "chat_template_kwargs"):
        if getattr(thinking, name):
            instead = "write it into question_template" if name == "system_prompt" else "leave it out"
            raise ValueError(f"{name} {getattr(thinking, name)!r:.60} needs a chat template, and {why}; {instead}")
