"""Who makes a rollout: the engine of this package, vLLM in this process, or a server. Decided here and nowhere else.

What asks for rollouts takes a `Roll`, a function that is called as `engine.rollout` is.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rl_soft.keys import either
from rl_soft.model.policy import eos_token_ids
from rl_soft.rollouts.engine import Watch, rollout
from rl_soft.rollouts.recording import Rollout
from rl_soft.rollouts.vllm.options import (
    check_architecture,
    check_vllm,
    engine_options,
    limits_for,
)
from rl_soft.rollouts.vllm.serve import check_servable
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.kinds import ENGINES
from rl_soft.thoughts.layout import Layout


class Roll(Protocol):
    """As `engine.rollout`. vLLM makes a rollout whole, so `watch` is called once, at the end."""

    def __call__(
        self,
        model: Any,
        layout: Layout,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor | None = None,
        eos_ids: Sequence[int] | None = None,
        token_budget: int | None = None,
        control: str = "none",
        decoding: Decoding | None = None,
        watch: Watch | None = None,
    ) -> Rollout: ...


def check_engine(engine: str, server: str | None, model: str, dtype: str) -> None:
    """Raises ValueError for an engine that is not there or does not take this model, before anything is loaded."""
    if not ENGINES[engine].adapters:
        check_servable(model)
    if server is not None:
        from rl_soft.rollouts.vllm.server import Server

        Server(server).check_model(model, dtype)
    elif engine != "ours":
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "engine vllm runs in one process (--nproc 1); for several GPUs start rl-soft serve MODEL "
                "--tensor-parallel-size N and give --server"
            )
        check_vllm()
        check_architecture(model)


def roll_of(
    engine: str, server: str | None, model: str, dtype: str, layouts: Sequence[Layout], questions: Sequence[str]
) -> Roll:
    """What makes the rollouts of a command.

    Args:
        engine: a key of `ENGINES`; server: the URL of one, or None for this process.
        model: a folder or a hub id, for which `check_engine` found nothing.
        layouts, questions: of the rollouts to come.

    Raises:
        ValueError: a kind of thought that the engine cannot roll out; what a server was not made for.
    """
    for layout in layouts:
        thinking = layout.thinking
        if engine not in thinking.engines:
            what = (
                f"thought {thinking.thought}" if engine not in thinking.kind.engines else f"switch {thinking.switch}"
            )
            raise ValueError(f"{what} is not available with engine {engine}; use engine {either(thinking.engines)}")
    if engine == "ours":
        return rollout
    longest = max(len(layout.prompt_ids(question)) for layout in layouts for question in questions)
    if server is None:
        return OnVllm(InProcess(model, dtype, layouts, longest))
    from rl_soft.rollouts.vllm.server import Server

    asked = Server(server)
    for layout in layouts:
        asked.check(layout, longest)
    return OnVllm(asked)


class OnVllm:
    """A `Roll` by an engine whose `rollout` takes the layout first, and no model."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __call__(
        self,
        model: Any,
        layout: Layout,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor | None = None,
        eos_ids: Sequence[int] | None = None,
        token_budget: int | None = None,
        control: str = "none",
        decoding: Decoding | None = None,
        watch: Watch | None = None,
    ) -> Rollout:
        if control != "none":
            raise ValueError(f"control {control} is not available with engine vllm")
        eos_ids = eos_token_ids(model, layout.tokenizer) if eos_ids is None else eos_ids
        out = self.engine.rollout(layout, prompt_ids, seeds, eos_ids, decoding)
        if watch is not None:
            watch(out, torch.ones(len(prompt_ids), dtype=torch.bool))
        return out


class InProcess:
    """A `vllm.LLM`, which is made at the first rollout: an evaluation that is complete needs none."""

    def __init__(self, model: str, dtype: str, layouts: Sequence[Layout], longest: int) -> None:
        self.model, self.dtype, self.llm = model, dtype, None
        self.layouts = list(layouts)
        self.length = longest + max(layout.max_completion_length for layout in layouts)

    def rollout(self, *args: Any, **kwargs: Any) -> Rollout:
        """As `vllm.engine.rollout`, without its first argument."""
        from rl_soft.rollouts.vllm.engine import rollout as on_vllm

        if self.llm is None:
            self.llm = self.make()
        return on_vllm(self.llm, *args, **kwargs)

    def make(self) -> Any:
        from transformers import AutoConfig

        from rl_soft.rollouts.vllm import cpu

        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # completions are on stdout
        from vllm import LLM

        V = AutoConfig.from_pretrained(self.model).get_text_config().vocab_size
        slots, thoughts = zip(*(limits_for(layout.thinking, V) for layout in self.layouts), strict=True)
        options = engine_options(self.model, max(slots), max(thoughts)) | {"enforce_eager": cpu.installed()}
        return LLM(self.model, dtype=self.dtype, max_model_len=self.length, **options)
