"""The model of a `lighteval custom` run: soft thinking on lighteval's tasks.

    lighteval custom "DIR,thought=gumbel,num_thoughts=256" $(python -m rl_soft.cli.lighteval_model) "gsm8k|0"

lighteval gives a custom model nothing but its name, so the name holds the keys too. It is run by its path; this module
prints it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import yaml
from lighteval.models.abstract_model import LightevalModel
from lighteval.models.model_output import ModelResponse
from lighteval.tasks.prompt_manager import PromptManager

from rl_soft.cli.harness import Asked, Harness


class SoftModel(LightevalModel):
    """Completions have the caps of the model's thinking. A task of one sample is answered without noise; of several,
    each by (seed, task/document, number)."""

    def __init__(self, config: Any) -> None:
        self.config = config
        name, *pairs = config.model_name.split(",")
        values = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ValueError(f"{pair!r} is no key=value; the name is DIR,key=value,...")
            values[key.strip()] = yaml.safe_load(value) if not value.startswith("#") else value
        self.harness = Harness(name, values)
        # Answers are not kept on the disk: a folder of the same name may hold another model tomorrow.
        self._cache = SimpleNamespace(_init_registry=lambda registry: None)
        thinking, tokenizer = self.harness.thinking, self.harness.tokenizer
        self._chat = thinking.phase == "explicit" and bool(tokenizer.chat_template)
        self._prompts = PromptManager(self._chat, tokenizer, None)

    @property
    def tokenizer(self) -> Any:
        return self.harness.tokenizer

    @property
    def add_special_tokens(self) -> bool:
        return not self._chat

    @property
    def max_length(self) -> int:
        return self.harness.max_length

    def _prompt(self, doc: Any) -> str:
        if self._chat:
            return self.harness.template(self._prompts.prepare_prompt_api(doc))
        return str(self._prompts.prepare_prompt(doc))

    def greedy_until(self, docs: list[Any]) -> list[ModelResponse]:
        asked, prompts = [], [self._prompt(doc) for doc in docs]
        for doc, prompt in zip(docs, prompts, strict=True):
            name, stop = f"{doc.task_name}/{doc.id}", tuple(doc.stop_sequences or ())
            asked += [Asked(name, prompt, n, doc.num_samples == 1, stop=stop) for n in range(doc.num_samples)]
        texts = iter(self.harness.answers(asked))
        return [
            ModelResponse(input=prompt, text=[next(texts) for _ in range(doc.num_samples)])
            for doc, prompt in zip(docs, prompts, strict=True)
        ]

    def loglikelihood(self, docs: list[Any]) -> list[ModelResponse]:
        found = []
        for doc in docs:
            contexts, continuations = self.tok_encode_pair(self._prompt(doc), doc.choices)
            scored = self.harness.log_likelihoods(list(zip(contexts, continuations, strict=True)))
            found.append(
                ModelResponse(
                    logprobs=[total for total, _ in scored],
                    argmax_logits_eq_gold=[greedy for _, greedy in scored],
                    output_tokens=continuations,
                )
            )
        return found

    def loglikelihood_rolling(self, docs: list[Any]) -> list[ModelResponse]:
        raise ValueError(
            "perplexity of a text is that of the plain model: lighteval accelerate, with the folder's name"
        )


if __name__ == "__main__":
    print(__file__)
