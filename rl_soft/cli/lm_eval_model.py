"""The model `rl_soft` of lm-eval (EleutherAI's lm-evaluation-harness): soft thinking on its tasks.

    rl-soft lm-eval --model_args pretrained=DIR,thought=gumbel --tasks gsm8k

From Python, importing this module is enough: `lm_eval.simple_evaluate(model="rl_soft", model_args=..., tasks=...)`.
lm-eval finds models by their registration alone, so its own command does not know of this one.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs

from rl_soft.cli.harness import Asked, Harness, logger

BATCH = 16  # completions decoded together; lm-eval's own default is 1
NOT_OURS = ("do_sample", "until", "max_gen_toks", "temperature")  # of a task; read here, or left to the model's caps


@register_model("rl_soft")
class SoftLM(TemplateLM):
    """Args are those of `Harness`, by name: pretrained=DIR, then any key.

    Completions have the caps of the model's thinking (num_thoughts, max_answer_tokens), not a task's max_gen_toks.
    Where a task samples, the noise of a completion is addressed by (seed, task/document, number of the repetition).
    """

    def __init__(
        self,
        pretrained: str = "",
        batch_size: int | str = BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
        **values: Any,
    ) -> None:
        super().__init__()
        if not pretrained:
            raise ValueError("pretrained is missing: --model_args pretrained=DIR,thought=gumbel,...")
        if str(batch_size).isdigit():  # not auto
            values["batch_size"] = int(batch_size)
        self.harness = Harness(pretrained, values, device)
        self.tokenizer = self.harness.tokenizer
        self._told = False

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def max_length(self) -> int:
        return self.harness.max_length

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.harness.template(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        begins = bos is not None and ids[:1] == [bos]
        wanted = not self.harness.templated if add_special_tokens is None else add_special_tokens
        return [bos, *ids] if wanted and bos is not None and not begins else ids

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked, seen = [], Counter[str]()
        for request in requests:
            context, given = request.args
            kwargs: dict[str, Any] = normalize_gen_kwargs(given)
            name = f"{request.task_name}/{request.doc_id}/{request.idx}"
            greedy = not kwargs["do_sample"]
            temperature = None if greedy else kwargs.get("temperature") or None
            asked.append(Asked(name, context, seen[name], greedy, temperature, tuple(kwargs["until"])))
            seen[name] += 1
            self._tell(kwargs)
        return self.harness.answers(asked)

    def _tell(self, kwargs: dict[str, Any]) -> None:
        """One line of what a task asks for and does not get."""
        if self._told:
            return
        self._told = True
        thinking = self.harness.thinking
        other = [f"{k}={v}" for k, v in kwargs.items() if k not in NOT_OURS]
        logger.warning(
            "num_thoughts %d and max_answer_tokens %d are the caps, not the task's max_gen_toks %s%s",
            thinking.num_thoughts,
            thinking.max_answer_tokens,
            kwargs["max_gen_toks"],
            f"; not used: {', '.join(other)} (give top_k, top_p, min_p as --model_args)" if other else "",
        )

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self.harness.log_likelihoods([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in requests:
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            pairs = [utils.make_disjoint_window(window) for window in windows]
            totals.append(sum(total for total, _ in self.harness.log_likelihoods(pairs)))
        return totals


def run(words: list[str]) -> None:
    """lm-eval's own command, with this model known to it and taken where none is named."""
    from lm_eval.__main__ import cli_evaluate

    def missing(*names: str) -> bool:
        return not any(word.partition("=")[0] in names for word in words)

    added = []
    if words[:1] in ([], ["run"]) or words[0].startswith("-"):  # not ls or validate
        added += ["--model", "rl_soft"] if missing("--model", "-M") else []
        added += ["--batch_size", str(BATCH)] if missing("--batch_size", "-b") else []
    sys.argv = ["lm-eval", *words, *added]
    cli_evaluate()
