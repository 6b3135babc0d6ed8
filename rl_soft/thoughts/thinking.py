"""`Thinking`: what a thought is and where it stands. It is saved beside the weights, which are trained for it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

from pydantic import Field

from rl_soft.keys import Number, OneOf, fields, keys
from rl_soft.thoughts.kinds import KINDS, Kind

PHASES = ("latent", "explicit")
CONTROLS = ("none", "zero", "shuffle", "repeat")  # what an analysis does to the thoughts, see `think.disturb`


@keys(frozen=True)
class Thinking:
    """What a thought is and where it stands; saved beside the weights, which are trained for one of these."""

    thought: Annotated[str, OneOf(KINDS)] = Field(
        default="gumbel",
        description=f"Thought kind. {'. '.join(f'{name}: {kind.help}' for name, kind in KINDS.items())}.",
    )
    phase: Annotated[str, OneOf(PHASES)] = Field(
        default="latent",
        description="latent: exactly num_thoughts between <bot> and <eot>; explicit: until end_of_thinking.",
    )
    num_thoughts: int = Field(
        default=6,
        ge=0,
        description="Number of thoughts (latent) or the most thoughts before the answer (explicit).",
    )
    thought_k: int = Field(
        default=4, ge=0, description="K, the number of token ids that a thought mixes; 0 = the whole vocabulary."
    )
    thought_tau: Number = Field(default=0.5, gt=0, description="Gumbel-Softmax temperature of the mixing weights.")
    thought_gamma: Number = Field(
        default=4.0,
        gt=0,
        description="dirichlet: total concentration; the weights come near the probabilities as it grows.",
    )
    thought_temperature: Number = Field(
        default=1.0, gt=0, description="Temperature T that divides the logits before a thought is drawn."
    )
    temperature: Number = Field(default=1.0, gt=0, description="Sampling temperature of the answer tokens.")
    max_answer_tokens: int = Field(
        default=16, ge=1, description="The most answer tokens, <eos> included; then a completion is truncated."
    )
    answer_prompt: str = Field(
        default="", description="Text fed before the answer, after the thoughts (not sampled, not trained)."
    )
    step_separator: str = Field(default="\n", description="Text after each step of a worked solution.")
    end_of_thinking: str = Field(
        default="", description="explicit: the text that ends the thinking when the strongest ids spell it."
    )
    system_prompt: str | None = Field(default=None, description="System message (models with a chat template).")
    question_template: str = Field(default="{question}", description="Text of the question; must contain {question}.")

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        kind = KINDS[self.thought]
        if kind.reads_hidden and self.phase != "latent":
            refuse("phase", f"latent for thought {self.thought} (its thoughts spell no end of thinking)")
        if self.phase == "explicit" and self.num_thoughts < 1:
            refuse("num_thoughts", "at least 1 when phase is explicit")
        if kind.noise == "dirichlet" and self.thought_k == 1:
            refuse("thought_k", "0 or at least 2 for thought dirichlet (a single weight is certain)")
        if self.phase == "explicit" and not self.end_of_thinking:
            refuse("end_of_thinking", "a text when phase is explicit")
        if "{question}" not in self.question_template:
            refuse("question_template", "a text that contains {question}")

    @property
    def kind(self) -> Kind:
        """What is true of this kind of thought."""
        return KINDS[self.thought]

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
