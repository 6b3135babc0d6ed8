"""The soft variant of a model of vLLM's: its own class, with our model state, and the projector of hidden thoughts.

`SoftLlamaForCausalLM` and its like are attributes of this module, each made when it is first asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from rl_soft.model.projector import PROJECTOR, Projector
from rl_soft.rollouts.vllm.plugin import PREFIX

_MADE: dict[str, type] = {}


class SoftModel:
    """Before a model class of vLLM's."""

    soft_hidden: Tensor | None = None  # (n, H), what the LM head has read last
    projector: Projector | None = None
    pending: dict[str, Tensor] = {}  # noqa: RUF012 (replaced, never changed): weights of a projector to come
    config: Any

    @staticmethod
    def get_model_state_cls() -> type:
        from rl_soft.rollouts.vllm.state import SoftModelState

        return SoftModelState

    def compute_logits(self, hidden_states: Tensor) -> Any:
        self.soft_hidden = hidden_states
        return super().compute_logits(hidden_states)  # type: ignore[misc]

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """The model's, but for those of a projector: from its file beside the model, or pushed under its name."""
        own: dict[str, Tensor] = {}

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, value in weights:
                if name.startswith(f"{PROJECTOR}."):
                    own[name.removeprefix(f"{PROJECTOR}.")] = value
                elif name in PARTS:  # of projector.safetensors
                    own[name] = value
                else:
                    yield name, value

        loaded = super().load_weights(others())  # type: ignore[misc]
        if own:
            self._load_projector(own)
        return loaded

    def _load_projector(self, state: dict[str, Tensor]) -> None:
        """All of its weights or, when they are pushed one by one, some."""
        if self.projector is None:
            self.pending = state = {**self.pending, **state}
            if "inner.weight" not in state:
                return  # which tells its size
            size, width = state["inner.weight"].shape
            # Outside of the modules, so that vLLM's ways to load and reload them leave it alone.
            object.__setattr__(self, PROJECTOR, Projector(width, size, state["inner.weight"].dtype))
        assert self.projector is not None
        self.projector.load_state_dict(state, strict=False)


PARTS = tuple(Projector(1, 1).state_dict())


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name not in _MADE:
        from vllm import ModelRegistry
        from vllm.model_executor.models.interfaces_base import is_text_generation_model

        base: Any = ModelRegistry.models[name.removeprefix(PREFIX)].load_model_cls()
        if not is_text_generation_model(base) or "inputs_embeds" not in inspect.signature(base.forward).parameters:
            raise AttributeError(f"{base.__name__} of vLLM takes no inputs_embeds: it cannot be fed soft thoughts")
        _MADE[name] = type(name, (SoftModel, base), {"__module__": __name__})
    return _MADE[name]


def leave_alone(model: Any) -> None:
    """A transformers model of this process stays itself.

    Where vLLM has no implementation of its own it decorates transformers' class, and with it the models that were
    made before.
    """
    from vllm.compilation.wrapper import TorchCompileWithNoGuardsWrapper

    for module in model.modules():
        if isinstance(module, TorchCompileWithNoGuardsWrapper) and "do_not_compile" not in vars(module):
            vars(module)["do_not_compile"] = True


def tie_again(model: Any) -> None:
    """After a reload on a CPU: a head that shares its weight with the embeddings has the old one packed."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    tables = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    heads = [m for m in tables if isinstance(m, ParallelLMHead)]
    if not heads or not getattr(model.config, "tie_word_embeddings", False):
        return
    embedding = next(m for m in tables if not isinstance(m, ParallelLMHead))
    for head in heads:
        head.tie_weights(embedding)
        head.quant_method.process_weights_after_loading(head)
