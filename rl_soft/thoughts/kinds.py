"""What is true of each kind of thought, and of each policy ratio. Nothing else in the package asks for a kind's name.

A kind is what stands in the place of a token embedding at a thought. `noise` decides whether it is drawn at all, and
so whether it has a density: a thought without noise is a point mass, which policy gradients cannot train.
"""

from __future__ import annotations

from dataclasses import dataclass

from rl_soft.keys import either, nearest


@dataclass(frozen=True)
class Kind:
    """What is true of a kind of thought."""

    help: str
    noise: str | None  # gumbel: on the log-probabilities of all ids; dirichlet: in the weights; None: nothing is drawn
    parameter: str | None  # the field of `Thinking` that its weights and its density take
    mixes: bool  # K ids with weights; otherwise one id
    reads_hidden: bool  # fed from the last hidden state, so that its thoughts spell no text and need phase latent
    trained_by: tuple[str, ...]  # methods
    ratios: tuple[str, ...]  # policy ratios made for it, the recommended one first (docs/grpo.md)
    engines: tuple[str, ...] = ("ours", "vllm")  # that can roll it out; vLLM reads hidden states and has the projector

    @property
    def has_density(self) -> bool:
        """Without noise a thought is a point mass."""
        return self.noise is not None

    @property
    def discrete(self) -> bool:
        """What is fed is the embedding of one id."""
        return not (self.mixes or self.reads_hidden)

    @property
    def has_gumbel_noise(self) -> bool:
        """One draw of noise over all ids serves a thought and a token alike."""
        return self.noise == "gumbel"

    @property
    def has_dirichlet_noise(self) -> bool:
        return self.noise == "dirichlet"

    @property
    def needs_projector(self) -> bool:
        """A gate adds the mixture to the projected state; a state alone can be fed without a projector (Coconut)."""
        return self.reads_hidden and self.mixes


@dataclass(frozen=True)
class Engine:
    """What is true of an engine that makes rollouts."""

    help: str
    controls: bool  # can disturb the thoughts that are fed (`think.disturb`)
    adapters: bool  # takes a model with an adapter that is not merged


ENGINES = {
    "ours": Engine("this package's, the reference, on any device", controls=True, adapters=True),
    "vllm": Engine("stock vLLM with our plugin (docs/vllm.md)", controls=False, adapters=False),
}

RL = ("grpo", "ppo")
KINDS = {
    "token": Kind(
        help="one token id, drawn (discrete chain of thought)",
        noise="gumbel",
        parameter=None,
        mixes=False,
        reads_hidden=False,
        trained_by=("sft", "icot", *RL),
        ratios=("joint", "factored", "top1", "conditional", "pathwise"),
    ),
    "soft": Kind(
        help="the softmax mixture of the K most probable ids; a point mass",
        noise=None,
        parameter=None,
        mixes=True,
        reads_hidden=False,
        trained_by=("codi",),
        ratios=(),
    ),
    "gumbel": Kind(
        help="a Gumbel-Softmax mixture of K ids, drawn",
        noise="gumbel",
        parameter="thought_tau",
        mixes=True,
        reads_hidden=False,
        trained_by=("codi", *RL),
        ratios=("top1", "joint", "factored", "conditional", "pathwise"),
    ),
    "dirichlet": Kind(
        help="random weights of the K most probable ids",
        noise="dirichlet",
        parameter="thought_gamma",
        mixes=True,
        reads_hidden=False,
        trained_by=RL,
        ratios=("joint",),
    ),
    "hidden": Kind(
        help="the projected last hidden state (CODI); a point mass",
        noise=None,
        parameter=None,
        mixes=False,
        reads_hidden=True,
        trained_by=("codi", "coconut"),
        ratios=(),
    ),
    "hybrid": Kind(
        help="the projected last hidden state plus a gated gumbel mixture",
        noise="gumbel",
        parameter="thought_tau",
        mixes=True,
        reads_hidden=True,
        trained_by=("codi", *RL),
        ratios=("top1", "joint", "factored"),
    ),
}


@dataclass(frozen=True)
class Ratio:
    """What stands in the policy ratio of a thought (S, x) with strongest id i* (formulas and bias: docs/grpo.md)."""

    help: str
    scores: str | None  # density: p(S, x); strongest: p(i*) = pi_{i*}; None: a thought is no action
    second_factor: bool = False  # p(S, x) / p(i*) too, clipped by itself
    remade: str | None = None  # thoughts are made again with gradients: from "noise", or from noise "given id" i*

    @property
    def scores_strongest(self) -> bool:
        return self.scores == "strongest"

    @property
    def one_by_one(self) -> bool:
        """Thoughts are fed one after another on a cache: phase latent, and no gradient checkpointing."""
        return self.remade is not None


RATIOS = {
    "joint": Ratio("p(S, x), the exact density", "density"),
    "factored": Ratio("p(i*) and p(S, x) / p(i*), clipped apart", "strongest", second_factor=True),
    "top1": Ratio("p(i*): exact as a marginal, biased as a gradient", "strongest"),
    "conditional": Ratio("p(i*), with gradients through the weights given i*", "strongest", remade="given id"),
    "pathwise": Ratio("none: gradients flow through thoughts made again from their noise", None, remade="noise"),
}


def check_trainable(thought: str, ratio: str) -> None:
    """Raises ValueError where RL cannot train a kind of thought, or not with this ratio."""
    kind = KINDS[thought]
    if not kind.has_density:
        others = [name for name, k in KINDS.items() if k.has_density and k.reads_hidden == kind.reads_hidden]
        more = f", which a checkpoint of thought {thought} can go on to" if kind.reads_hidden else ""
        raise ValueError(
            f"thought {thought} has no density (it is a point mass): RL cannot train it; use {either(others)}{more}"
        )
    if ratio not in RATIOS:
        raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {ratio!r}" + nearest(ratio, RATIOS))
    if ratio not in kind.ratios:
        raise ValueError(f"ratio {ratio} is not made for thought {thought}, which takes {either(kind.ratios)}")
