"""The scored forward pass: log-densities of recorded soft completions, from the model's own forward.

`add_soft_forward` gives a causal LM's forward one more keyword, `soft=`, which feeds mixtures of embeddings instead of
ids and returns log-densities instead of logits. It is a method on the model itself (under any LoRA adapter), so that
DDP, DeepSpeed and gradient-checkpointing hooks see an ordinary forward call.

Four ways to the hidden states. By the ratio that is wanted (`kinds.RATIOS`): one teacher-forced pass over the recorded
thoughts; or the thoughts one after another, made again from their noise (pathwise) or from their noise given their
ids (conditional), with gradients from each position to the thoughts before it. And for thought hybrid the recorded
thoughts one after another, since each is fed together with the projected state before it.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from rl_soft.model.gate import gate_of, mode_log_prob
from rl_soft.model.head import soft_log_prob, support_statistics
from rl_soft.model.kl import categorical_kl
from rl_soft.model.logit_map import LogitMap, logit_map
from rl_soft.model.sharded import is_sharded
from rl_soft.model.side_modules import trunk_of
from rl_soft.model.think import density_of, mix_embeddings, position_ids, think, thought_input
from rl_soft.model.value_head import state_values
from rl_soft.thoughts.densities import is_present
from rl_soft.thoughts.kinds import RATIOS
from rl_soft.thoughts.thinking import Thinking


@dataclass
class SoftInputs:
    """A batch of prompts (left-padded) and soft completions (right-padded), as the rollout recorded them."""

    prompt_ids: Tensor  # (B, P) int64
    support: Tensor  # (B, C, K) int64
    log_weights: Tensor  # (B, C, K) float32; a token is [0, -inf, ...]
    action_mask: Tensor  # (B, C) bool: positions that were sampled, and so have a density
    thought_mask: Tensor  # (B, C) bool: of those, the thoughts
    thinking: Thinking
    ratio: str = "joint"  # a name of `kinds.RATIOS`
    seeds: Tensor | None = None  # (B,) int64, of the rollout's noise; read by pathwise
    support_log_probs: Tensor | None = None  # (B, C, K) float32, ln pi at the rollout; read by conditional
    kept: Tensor | None = None  # (B, C, W) int32, of a cut distribution: what it kept beside the support; -1 absent
    entropy_grad: bool = False
    states_only: bool = False  # return the states that the head reads, and nothing else
    aux_loss: bool = False  # return the load-balancing loss of a mixture of experts, too; one teacher-forced pass only
    ref_states: Tensor | None = None  # (B, C, H) the reference's, from such a pass; then its KL is returned
    ref_head: Any = None  # the reference's head, see `reference_head`


@dataclass
class SoftOutput(ModelOutput):
    """What `forward(soft=...)` returns; B rows, C positions of the completion."""

    log_probs: Tensor | None = None  # (B, C) float32, 0 where action_mask is off
    entropy: Tensor | None = None  # (B, C) float32, nats, of the categorical at temperature T
    value_preds: Tensor | None = None  # (B, C) float32, V of each state, where the model has a value head
    rest: Tensor | None = None  # (B, C) float32, second factor of a ratio: log p(rest | strongest id), 0 off thoughts
    kl: Tensor | None = None  # (B, C) float32, nats, KL to the reference's categorical, 0 where nothing is scored
    states: Tensor | None = None  # (B, C, H) float dtype of the model; states_only
    aux_loss: Tensor | None = None  # (), as the model's own forward gives it; aux_loss


class Causal(NamedTuple):
    """A causal LM, and what the ways to its states need of it."""

    model: Any
    inner: Any  # its forward, without ours
    logit_map: LogitMap


def strongest_log_prob(
    support_log_probs: Tensor, log_outside: Tensor, log_weights: Tensor, parameter: float
) -> Tensor:
    """ln pi of the strongest id, the marginal of the joint density, as a function of gathered statistics."""
    return support_log_probs[..., 0]


def add_soft_forward(model: PreTrainedModel, chunk_size: int | None = None) -> None:
    """Let `model.forward(attention_mask=..., soft=SoftInputs)` return a `SoftOutput`; other calls are unchanged.

    Args:
        model: a causal LM of transformers, without its PEFT wrapper.
        chunk_size: positions whose (chunk, V) logits are alive at once; None sizes it by memory.

    Raises:
        ValueError: a model that does more between its states and its logits than scale and cap them (`logit_map`).
    """
    inner, head_map = model.forward, logit_map(model)
    head_softcap = head_map.raw_softcap

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, soft: SoftInputs | None = None, **kwargs: Any) -> Any:
        if soft is None:
            return inner(*args, **kwargs)
        causal, aux_loss = Causal(self, inner, head_map), None
        if soft.aux_loss:
            hidden, aux_loss = _states_and_aux_loss(causal, soft, kwargs["attention_mask"])  # (B, C, H), ()
        else:
            hidden = _states(soft)(causal, soft, kwargs["attention_mask"])  # (B, C, H)
        if soft.states_only:
            return SoftOutput(states=hidden)
        ratio = RATIOS[soft.ratio]
        on = soft.action_mask if ratio.scores else soft.action_mask & ~soft.thought_mask
        thinking, thoughts = soft.thinking, soft.thought_mask
        joint, parameter = density_of(thinking)

        def temperature(where: Tensor) -> Tensor:
            wanted = torch.where(thoughts[where], thinking.thought_temperature, thinking.temperature).float()  # (N,)
            return head_map.temperature(wanted)

        def spread(where: Tensor, values: Tensor) -> Tensor:
            """(N,) values to their positions in (B, C), 0 off `where`."""
            return torch.zeros(where.shape, device=where.device).masked_scatter(where, values.float())

        def score(where: Tensor, density: Any) -> tuple[Tensor, Tensor]:
            """(B, C) log-density and entropy, 0 off `where`."""
            log_probs, entropy = soft_log_prob(
                hidden[where],
                self.get_output_embeddings(),
                soft.support[where],
                soft.log_weights[where],
                parameter,
                temperature(where),
                density=density,
                thought_mask=thoughts[where],
                kept=None if soft.kept is None else soft.kept[where].long(),
                chunk_size=chunk_size,
                softcap=head_softcap,
                entropy_grad=soft.entropy_grad,
            )
            return spread(where, log_probs), spread(where, entropy)

        log_probs, entropy = score(on, strongest_log_prob if ratio.scores_strongest else joint)
        rest = None
        if ratio.second_factor:
            rest = score(on & thoughts, joint)[0] - log_probs * (on & thoughts)
        if (gate := gate_of(self, thinking)) is not None:  # two slots or more: a soft thought
            of_mode = mode_log_prob(gate(hidden), is_present(soft.log_weights[..., 1]))
            log_probs = log_probs + torch.where(on & thoughts, of_mode, 0.0)
        kl = None
        if soft.ref_states is not None:
            states = hidden[on], self.get_output_embeddings(), soft.ref_states[on], soft.ref_head
            kl = spread(on, categorical_kl(*states, temperature(on), chunk_size=chunk_size, softcap=head_softcap))
        value_preds = state_values(self, hidden)
        return SoftOutput(log_probs, entropy, value_preds, rest, kl, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]


def _states(soft: SoftInputs) -> Any:
    """What computes the states (B, C, H) that predict each position of the completion."""
    if soft.thinking.kind.reads_hidden:
        return _hybrid_states
    remade = RATIOS[soft.ratio].remade
    if remade == "given id":
        return _recorded_states if soft.states_only else _conditional_states  # the reference takes what was fed
    return _pathwise_states if remade else _recorded_states


def _recorded_states(causal: Causal, soft: SoftInputs, attention_mask: Tensor) -> Tensor:
    """One teacher-forced pass over the recorded actions; the thoughts fed are constants."""
    if _can_share_prompts(causal.model, soft.prompt_ids):
        prompts = torch.cat([soft.prompt_ids, attention_mask[:, : soft.prompt_ids.shape[1]]], dim=1)  # (B, 2P)
        distinct, number = prompts.unique(dim=0, return_inverse=True)
        if 2 * len(distinct) <= len(prompts):
            return _states_after_shared_prompts(causal.model, soft, attention_mask, number)
    states = causal.model.base_model(**_recorded(causal.model, soft, attention_mask)).last_hidden_state
    return states[:, -soft.support.shape[1] - 1 : -1]


def _can_share_prompts(model: Any, prompt_ids: Tensor) -> bool:
    """Whether a prompt may go through the model apart from what follows it: on a CPU, where positions are the cost; in
    layers that see all positions before them; not under checkpointing, which drops the cache; and not where layers are
    gathered at each call, since processes must make as many calls."""
    config = model.config.get_text_config()
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    return (
        prompt_ids.device.type == "cpu"
        and not (windows or getattr(config, "sliding_window", None))
        and not (is_sharded(model) or any(hasattr(p, "ds_id") for p in model.parameters()))
        and not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    )


def _states_after_shared_prompts(model: Any, soft: SoftInputs, attention_mask: Tensor, number: Tensor) -> Tensor:
    """As `_recorded_states`; each of the U prompts once, as in the rollout, and its rows go on from its keys and
    values.

    Args:
        number: (B,) int64, which of the U prompts a row has.
    """
    embedding, P, C = model.get_input_embeddings(), *soft.prompt_ids.shape[1:], soft.support.shape[1]
    first = torch.stack([(number == u).nonzero()[0, 0] for u in range(int(number.max()) + 1)])  # (U,)
    mask, positions = attention_mask[first, :P], position_ids(attention_mask)
    cache: Any = DynamicCache(config=model.config)
    last = model.base_model(
        inputs_embeds=embedding(soft.prompt_ids[first]),
        attention_mask=mask,
        position_ids=positions[first, :P],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1:]  # (U, 1, H)
    for layer in cache.layers:  # by index_select, whose gradients are summed in one order on any number of threads
        layer.keys, layer.values = (x.index_select(0, number) for x in (layer.keys, layer.values))
    mixtures = mix_embeddings(embedding, soft.support[:, : C - 1], soft.log_weights[:, : C - 1])
    states = model.base_model(
        inputs_embeds=mixtures,
        attention_mask=attention_mask[:, : P + C - 1],
        position_ids=positions[:, P : P + C - 1],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return torch.cat([last.index_select(0, number), states], dim=1)


def _recorded(model: Any, soft: SoftInputs, attention_mask: Tensor) -> dict[str, Any]:
    """What the model is called with to read the recorded actions."""
    embedding = model.get_input_embeddings()
    prompts, mixtures = embedding(soft.prompt_ids), mix_embeddings(embedding, soft.support, soft.log_weights)
    return {
        "inputs_embeds": torch.cat([prompts, mixtures], dim=1),  # (B, P+C, H)
        "attention_mask": attention_mask,
        "position_ids": position_ids(attention_mask),
        "use_cache": False,
    }


def _states_and_aux_loss(causal: Causal, soft: SoftInputs, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """As `_recorded_states`; and the load-balancing loss (), which the model's own forward makes of the routers.

    It covers prompt and completion, as TRL's does.
    """
    seen: list[Tensor] = []
    hook = trunk_of(causal.model).register_forward_hook(lambda _, args, out: seen.append(out.last_hidden_state))
    try:
        out = causal.inner(
            **_recorded(causal.model, soft, attention_mask), output_router_logits=True, logits_to_keep=1
        )
    finally:
        hook.remove()
    if getattr(out, "aux_loss", None) is None:
        raise ValueError(
            f"model {type(causal.model).__name__} returns no load-balancing loss; set router_aux_loss_coef 0"
        )
    return seen[-1][:, -soft.support.shape[1] - 1 : -1], out.aux_loss


def _pathwise_states(causal: Causal, soft: SoftInputs, attention_mask: Tensor) -> Tensor:
    """The thoughts are made again from the recorded noise, so that gradients of the answer flow through them.

    Latent phase only: every row has its n thoughts first. Positions of thoughts return zeros; they are not scored.
    """
    model, inner, _ = causal
    embedding, n = model.get_input_embeddings(), soft.thinking.num_thoughts
    mask = attention_mask[:, : soft.prompt_ids.shape[1]]
    cache = DynamicCache(config=model.config)
    logits = inner(
        inputs_embeds=embedding(soft.prompt_ids),
        attention_mask=mask,
        position_ids=position_ids(mask),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits[:, -1]
    mask, position, _ = think(inner, model, logits, None, cache, mask, soft.thinking, soft.seeds)
    states = _answer_states(model, soft, cache, mask, position, attention_mask)
    return torch.cat([states.new_zeros(len(states), n + 1, states.shape[-1]), states], dim=1)


def _answer_states(
    model: Any, soft: SoftInputs, cache: Any, mask: Tensor, position: Tensor, attention_mask: Tensor
) -> Tensor:
    """(B, C - n - 1, H) states after the thoughts, on the cache that holds prompt and thoughts: what is fed next, and
    the answer. The first thing fed follows the last thought, so nothing before it needs a state."""
    tail = soft.support[:, soft.thinking.num_thoughts :, 0]  # (B, C - n)
    states = model.base_model(
        inputs_embeds=model.get_input_embeddings()(tail),
        attention_mask=torch.cat([mask, attention_mask[:, mask.shape[1] :]], dim=1),
        position_ids=position + torch.arange(tail.shape[1], device=position.device),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states[:, :-1]


def conditional_log_weights(log_weights: Tensor, change: Tensor, tau: float) -> Tensor:
    """Log-weights (..., K) of the same gumbel thought after its log-probabilities changed by `change` (..., K), given
    its strongest id.

    Of the perturbed log-probabilities z the largest, M, is standard Gumbel noise whatever the policy is, and the
    others are Gumbels cut off at M, z_j = -ln(e^-M + e^-(phi_j + g_j)) with noise g_j (Maddison et al. 2014, "A*
    sampling", arXiv 1411.0030). With the noise kept and d = z - M,

        exp(-d_new) = 1 + (exp(-d_old) - 1) exp(-change),    d_old = tau (x - x_1)

    so that neither M nor the noise has to be known.
    """
    d = tau * (log_weights - log_weights[..., :1])  # (..., K) <= 0, 0 for the strongest
    u = torch.expm1(-d).clamp(min=1e-12).log() - change
    d_new = torch.cat([torch.zeros_like(d[..., :1]), -F.softplus(u)[..., 1:]], dim=-1)
    return torch.log_softmax(d_new / tau, dim=-1)


def _conditional_states(causal: Causal, soft: SoftInputs, attention_mask: Tensor) -> Tensor:
    """The weights of each thought are made again given its recorded ids, so that gradients flow through them."""
    model, thinking, head_map = causal.model, soft.thinking, causal.logit_map
    head, temperature = model.get_output_embeddings(), head_map.temperature(thinking.thought_temperature)
    assert soft.support_log_probs is not None
    before = soft.support_log_probs

    def fed(t: int, state: Tensor) -> Tensor:
        support = soft.support[:, t]  # (B, K)
        now = support_statistics(state, head, support, temperature, softcap=head_map.raw_softcap)[0]
        log_weights = conditional_log_weights(soft.log_weights[:, t], now - before[:, t], thinking.thought_tau)
        return mix_embeddings(model.get_input_embeddings(), support, log_weights)

    return _one_after_another(model, soft, attention_mask, fed)


def _hybrid_states(causal: Causal, soft: SoftInputs, attention_mask: Tensor) -> Tensor:
    """The recorded mixtures are constants; the projected states that they are fed with are made again, so that the
    states are those of the rollout, and gradients flow through them."""
    model = causal.model

    def fed(t: int, state: Tensor) -> Tensor:
        return thought_input(model, soft.thinking, soft.support[:, t], soft.log_weights[:, t], state)

    return _one_after_another(model, soft, attention_mask, fed)


def _one_after_another(
    model: Any, soft: SoftInputs, attention_mask: Tensor, fed: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The states (B, C, H) with thought t fed as `fed(t, state before it (B, H))`, (B, H).

    Latent phase only: every row has its n thoughts first.
    """
    n = soft.thinking.num_thoughts
    mask = attention_mask[:, : soft.prompt_ids.shape[1]]
    cache, positions = DynamicCache(config=model.config), position_ids(mask)
    embeds, states = model.get_input_embeddings()(soft.prompt_ids), []
    for t in range(n + 1):
        last = model.base_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1:]  # (B, 1, H)
        states.append(last)
        positions = mask.sum(-1, keepdim=True)
        if t < n:
            embeds = fed(t, last[:, 0])[:, None]  # (B, 1, H)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    answer = _answer_states(model, soft, cache, mask, positions, attention_mask)
    return torch.cat([*states, answer], dim=1)
