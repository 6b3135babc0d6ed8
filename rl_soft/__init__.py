"""RL fine-tuning of language models whose thoughts are soft tokens.

`rl_soft.generate`, with `rl_soft.Thinking` and `rl_soft.Decoding`, is soft thinking with any causal language model;
it is loaded when it is asked for, so that importing the package costs nothing.
"""

import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl_soft.evaluation.generation import Completion as Completion
    from rl_soft.evaluation.generation import generate as generate
    from rl_soft.thoughts.decoding import Decoding as Decoding
    from rl_soft.thoughts.thinking import Thinking as Thinking

__version__ = "0.1.0"

if "HF_HUB_DISABLE_TELEMETRY" not in os.environ:  # TRL pings at trainer construction otherwise
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    if "huggingface_hub.constants" in sys.modules:  # which read the variable when it was imported
        sys.modules["huggingface_hub.constants"].HF_HUB_DISABLE_TELEMETRY = True  # type: ignore[attr-defined]

_HOME = {
    "generate": "evaluation.generation",
    "Completion": "evaluation.generation",
    "Decoding": "thoughts.decoding",
    "Thinking": "thoughts.thinking",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
