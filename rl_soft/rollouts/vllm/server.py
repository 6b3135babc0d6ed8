"""A rollout by a server that `rl-soft serve` has started, here or on another node: the same records as anywhere.

One request per row, through the server's /v1/completions, many at once: the server puts them into one batch.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from rl_soft.rollouts.recording import Rollout
from rl_soft.rollouts.vllm.about import ROUTE, identity
from rl_soft.rollouts.vllm.engine import assemble
from rl_soft.rollouts.vllm.options import check_length, check_limits
from rl_soft.rollouts.vllm.request import Recorded, decode, record_width, to_arguments
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout

ANSWERS = 10  # seconds until a server that is there has answered what it is
FINISHES = 3600  # until a row is done, its wait for a place included
MOST = 512  # requests that are under way at once
TOKEN = "token_id:"  # how an id is called in the logprobs of a response


class Server:
    """A server, once it is sure that it serves soft rows.

    Args:
        url: http://HOST:PORT, with or without /v1.

    Raises:
        ValueError: nothing answers there; what answers is no vLLM with the plugin.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"server must be http://HOST:PORT, got {url!r}")
        try:
            with urllib.request.urlopen(self.url + ROUTE, timeout=ANSWERS) as response:
                self.about: dict[str, Any] = json.load(response)
            self.about["slots"], self.about["weights"]
        except urllib.error.HTTPError as error:
            raise self._without_plugin(f"it answers {ROUTE} with {error.code}") from None
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(f"server {self.url} cannot be reached: {reason}; start one with rl-soft serve") from None
        except (ValueError, KeyError, TypeError):
            raise self._without_plugin(f"it does not say what it is at {ROUTE}") from None

    def _without_plugin(self, why: str) -> ValueError:
        return ValueError(f"server {self.url} serves no soft rows ({why}); start it with rl-soft serve MODEL")

    def check_model(self, model: str, dtype: str) -> None:
        """Raises ValueError where another model than `model`, a folder or hub id, or in another dtype, is served."""
        ours, theirs = identity(model), self.about
        said = f"server {self.url} serves another model, {theirs['model']}"
        for key in sorted(ours["config"].keys() | theirs["config"].keys()):
            here, there = ours["config"].get(key), theirs["config"].get(key)
            if ours["config"] and theirs["config"] and here != there:
                raise ValueError(f"{said}: its {key} is {there!r}, that of {model} is {here!r}")
        if None not in (ours["weights"], theirs["weights"]) and ours["weights"] != theirs["weights"]:
            raise ValueError(f"{said}: its weights are not those of {model}")
        if not (ours["config"] and theirs["config"]) and model != theirs["model"]:
            raise ValueError(f"{said}, not {model}")
        if dtype != theirs["dtype"]:
            raise ValueError(
                f"dtype is {dtype}, and server {self.url} has {theirs['dtype']}: give --dtype {theirs['dtype']} here, "
                f"or --dtype {dtype} to rl-soft serve"
            )

    def check(self, layout: Layout, longest: int = 0) -> None:
        """Raises ValueError for thoughts that the server was not made for, or a context too short for prompts of
        `longest` ids."""
        about, name = self.about, f"server {self.url}"
        named = f"{name} (rl-soft serve --slots, --thoughts)"
        check_limits(layout.thinking, about["vocab_size"], about["slots"], about["thoughts"], named)
        check_length(about["max_model_len"], longest, layout.max_completion_length, name)

    def rollout(
        self,
        layout: Layout,
        prompt_ids: Sequence[Sequence[int]],
        seeds: Tensor | None,
        eos_ids: Sequence[int],
        decoding: Decoding | None = None,
        device: torch.device | str = "cpu",
    ) -> Rollout:
        """One completion for each prompt; arguments as in `engine.rollout`.

        Raises:
            ValueError: a context that is too short; thoughts that the server was not made for; a request that it
                refuses, or does not answer.
        """
        each = [None] * len(prompt_ids) if seeds is None else seeds.tolist()
        rows = self.positions(layout, [*zip(prompt_ids, each, strict=True)], eos_ids, decoding)
        return assemble(layout, self.about["vocab_size"], prompt_ids, seeds, eos_ids, rows, torch.device(device))

    def positions(
        self,
        layout: Layout,
        asked: Sequence[tuple[Sequence[int], int | None]],
        eos_ids: Sequence[int],
        decoding: Decoding | None = None,
    ) -> list[list[Recorded]]:
        """The positions of rows, each asked for by its prompt's ids and its seed, None for greedy decoding.

        Raises:
            ValueError: as `rollout`.
        """
        self.check(layout, max(len(ids) for ids, _ in asked))
        V, length, T = self.about["vocab_size"], self.about["max_model_len"], layout.max_completion_length
        bodies = [
            {
                "prompt": list(ids),
                "max_tokens": min(T + 1, length - len(ids)),  # one more than it takes, to say that it is done
                "ignore_eos": True,
                "stop_token_ids": list(eos_ids),
                "logprobs": record_width(layout.thinking.support_size(V)) - 1,
                "return_tokens_as_token_ids": True,
                "vllm_xargs": to_arguments(layout.thinking, decoding, eos_ids, seed),
            }
            for ids, seed in asked
        ]
        places = max(1, min(len(bodies), MOST, 2 * self.about["max_num_seqs"]))
        with ThreadPoolExecutor(places) as threads:
            answers = [threads.submit(self._row, body, V) for body in bodies]
            try:
                return [answer.result() for answer in answers]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _row(self, body: dict[str, Any], vocab_size: int) -> list[Recorded]:
        """The positions of one row."""
        request = urllib.request.Request(
            self.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=FINISHES) as response:
                choice = json.load(response)["choices"][0]
        except urllib.error.HTTPError as error:
            raise ValueError(f"server {self.url} refuses a row: {_message(error)}") from None
        except (OSError, urllib.error.URLError) as error:
            reason = getattr(error, "reason", None) or error
            raise ValueError(f"server {self.url} has stopped answering: {reason}") from None
        return [decode(_entries(position), vocab_size) for position in choice["logprobs"]["top_logprobs"]]


def _entries(position: dict[str, float]) -> list[tuple[int, float]]:
    """Of one position; the reported id comes first."""
    return [(int(name.removeprefix(TOKEN)), value) for name, value in position.items()]


def _message(error: urllib.error.HTTPError) -> str:
    """What an error of the OpenAI API says."""
    text = error.read().decode(errors="replace")
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return f"{error.code} {' '.join(text.split())[:300]}"
