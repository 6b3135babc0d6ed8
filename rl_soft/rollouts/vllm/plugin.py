"""What vLLM finds when it looks for plugins: the soft variant of every text-generation architecture that it knows.

The variants are asked for by name (`options.soft_architecture`), so an ordinary vLLM on the same machine is not
changed. They are made from the registered classes when they are resolved (`models`).
"""

from __future__ import annotations

PREFIX = "Soft"
ENDINGS = ("ForCausalLM", "LMHeadModel")  # how the architectures of text-generation models are called


def register() -> None:
    """The entry point `vllm.general_plugins`; vLLM calls it in each of its processes."""
    from vllm import ModelRegistry

    for name in [*ModelRegistry.get_supported_archs()]:
        if name.endswith(ENDINGS) and not name.startswith(PREFIX):
            ModelRegistry.register_model(PREFIX + name, f"rl_soft.rollouts.vllm.models:{PREFIX}{name}")
