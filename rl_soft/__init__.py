"""RL fine-tuning of language models whose thoughts are soft tokens.

The public names are loaded when they are asked for, so that importing the package costs nothing.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_soft.config.recipe import load_recipe as load_recipe
    from rl_soft.data.row import Row as Row
    from rl_soft.data.sources import assert_disjoint as assert_disjoint
    from rl_soft.data.sources import load_rows as load_rows
    from rl_soft.evaluation.generation import Completion as Completion
    from rl_soft.evaluation.generation import generate as generate
    from rl_soft.evaluation.passk import pass_at_k as pass_at_k
    from rl_soft.evaluation.report import compare as compare
    from rl_soft.evaluation.samples import evaluate as evaluate
    from rl_soft.model.policy import Policy as Policy
    from rl_soft.model.policy import load_policy as load_policy
    from rl_soft.rollouts.engine import rollout as rollout
    from rl_soft.rollouts.recording import Rollout as Rollout
    from rl_soft.thoughts.decoding import Decoding as Decoding
    from rl_soft.thoughts.densities import Dirichlet as Dirichlet
    from rl_soft.thoughts.densities import GumbelTopK as GumbelTopK
    from rl_soft.thoughts.densities import SoftToken as SoftToken
    from rl_soft.thoughts.layout import Layout as Layout
    from rl_soft.thoughts.thinking import Thinking as Thinking
    from rl_soft.train.codi import CodiTrainer as CodiTrainer
    from rl_soft.train.grpo import SoftGRPOTrainer as SoftGRPOTrainer
    from rl_soft.train.pipeline import run as run
    from rl_soft.train.ppo import SoftPPOConfig as SoftPPOConfig
    from rl_soft.train.ppo import SoftPPOTrainer as SoftPPOTrainer

__version__ = "0.1.0"

if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:  # TRL pings at trainer construction otherwise
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # which read the variable when it was imported
        sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]

_HOME = {
    "GumbelTopK": "thoughts.densities",
    "Dirichlet": "thoughts.densities",
    "SoftToken": "thoughts.densities",
    "Thinking": "thoughts.thinking",
    "Decoding": "thoughts.decoding",
    "Layout": "thoughts.layout",
    "generate": "evaluation.generation",
    "Completion": "evaluation.generation",
    "load_policy": "model.policy",
    "Policy": "model.policy",
    "rollout": "rollouts.engine",
    "Rollout": "rollouts.recording",
    "SoftGRPOTrainer": "train.grpo",
    "SoftPPOTrainer": "train.ppo",
    "SoftPPOConfig": "train.ppo",
    "CodiTrainer": "train.codi",
    "load_rows": "data.sources",
    "Row": "data.row",
    "assert_disjoint": "data.sources",
    "evaluate": "evaluation.samples",
    "pass_at_k": "evaluation.passk",
    "compare": "evaluation.report",
    "load_recipe": "config.recipe",
    "run": "train.pipeline",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
