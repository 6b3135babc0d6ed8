"""`Thinking`: what a thought is and where it stands. It is saved beside the weights, which are trained for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from rl_soft.thoughts.kinds import KINDS, Kind

PHASES = ("latent", "explicit")
THOUGHTS = tuple(KINDS)
CONTROLS = ("none", "zero", "shuffle", "repeat")  # what an analysis does to the thoughts, see `think.disturb`


@dataclass(frozen=True)
class Thinking:
    """What a thought is and where it stands; saved beside the weights, which are trained for one of these."""

    thought: str = field(
        default="gumbel",
        metadata={
            "help": "Thought kind: gumbel (Gumbel-Softmax mixture, random), dirichlet (random weights of the K most "
            "probable ids), soft (their softmax mixture), hidden (the projected last hidden state), hybrid (hidden "
            "plus a gated gumbel mixture) or token."
        },
    )
    phase: str = field(
        default="latent",
        metadata={"help": "latent: exactly num_thoughts between <bot> and <eot>; explicit: until end_of_thinking."},
    )
    num_thoughts: int = field(
        default=6, metadata={"help": "Number of thoughts (latent) or the most thoughts before the answer (explicit)."}
    )
    thought_k: int = field(default=4, metadata={"help": "K, the number of token ids that a thought mixes; 0 = all."})
    thought_tau: float = field(default=0.5, metadata={"help": "Gumbel-Softmax temperature of the mixing weights."})
    thought_gamma: float = field(
        default=4.0,
        metadata={"help": "dirichlet: total concentration; the weights come near the probabilities as it grows."},
    )
    thought_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T that divides the logits before a thought is drawn."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Sampling temperature of the answer tokens."})
    max_answer_tokens: int = field(
        default=16, metadata={"help": "The most answer tokens, <eos> included; then a completion is truncated."}
    )
    answer_prompt: str = field(
        default="", metadata={"help": "Text fed before the answer, after the thoughts (not sampled, not trained)."}
    )
    step_separator: str = field(default="\n", metadata={"help": "Text after each step of a worked solution."})
    end_of_thinking: str = field(
        default="", metadata={"help": "explicit: the text that ends the thinking when the strongest ids spell it."}
    )
    system_prompt: str | None = field(default=None, metadata={"help": "System message (models with a chat template)."})
    question_template: str = field(
        default="{question}", metadata={"help": "Text of the question; must contain {question}."}
    )

    def __post_init__(self) -> None:
        def refuse(name: str, allowed: str) -> None:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")

        if self.thought not in THOUGHTS:
            refuse("thought", f"one of {', '.join(THOUGHTS)}")
        if self.phase not in PHASES:
            refuse("phase", f"one of {', '.join(PHASES)}")
        if self.thought in ("hidden", "hybrid") and self.phase != "latent":
            refuse("phase", f"latent for thought {self.thought} (its thoughts spell no end of thinking)")
        if self.num_thoughts < 0 or (self.phase == "explicit" and self.num_thoughts < 1):
            refuse("num_thoughts", "at least 1 (explicit) or 0 (latent)")
        if self.thought_k < 0:
            refuse("thought_k", "0 (the whole vocabulary) or at least 1")
        if self.thought == "dirichlet" and self.thought_k == 1:
            refuse("thought_k", "0 or at least 2 for thought dirichlet (a single weight is certain)")
        for name in ("thought_tau", "thought_gamma", "thought_temperature", "temperature"):
            if not getattr(self, name) > 0:
                refuse(name, "above 0")
        if self.max_answer_tokens < 1:
            refuse("max_answer_tokens", "at least 1")
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
        known = {f.name for f in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in known})
