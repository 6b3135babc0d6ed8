"""The command line of a server: `vllm serve` as it is published, with the options that soft rows need.

A user's own options stand behind ours. What would break soft rows is refused; what can be added to is added to.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from rl_soft.model.folder import is_adapter, model_folder
from rl_soft.rollouts.vllm import cpu
from rl_soft.rollouts.vllm.options import SLOTS, THOUGHTS, check_architecture, check_vllm, engine_options

MIDDLEWARE = "rl_soft.rollouts.vllm.about.About"
REFUSED = {  # option -> why soft rows cannot have it
    "--scheduler-cls": "the plugin has its own, so that blocks of thoughts are never taken for those of ids",
    "--no-enable-prompt-embeds": "thoughts are fed as embeddings",
    "--speculative-config": "a draft is made of tokens, and thoughts are none",
    "-sc": "a draft is made of tokens, and thoughts are none",
}
PIPELINE = ("--pipeline-parallel-size", "-pp")
WEIGHTS = "--weight-transfer-config"  # of a server that a trainer sends weights to


def command(model: str, words: list[str], slots: int = SLOTS, thoughts: int = THOUGHTS) -> list[str]:
    """The program and its arguments; sets what has to be set in this process's environment.

    Args:
        model: a folder, a run, or a hub id.
        words: options of `vllm serve`.
        slots: S, the most ids that a request's thoughts may mix; thoughts: N, the most thoughts of a row.

    Raises:
        ValueError: vLLM is missing or of another version; a model that it cannot serve; an option that would break
            soft rows.
    """
    if slots < 1 or thoughts < 1:
        raise ValueError(f"slots and thoughts must be at least 1, got {slots} and {thoughts}")
    model = model_folder(model)
    check_servable(model)
    given, rest = take(words, ("--hf-overrides", "--additional-config", "--logits-processors", "--max-logprobs"))
    check_options(rest)
    check_vllm()
    check_architecture(model)
    options = engine_options(model, slots, thoughts)
    for name, key in (("hf_overrides", "architectures"), ("additional_config", "soft")):
        for text in given[f"--{name.replace('_', '-')}"]:
            options[name] = _merged(name.replace("_", "-"), text, key) | options[name]
    options["logits_processors"] += given["--logits-processors"]
    for text in given["--max-logprobs"]:
        number = int(text) if text.lstrip("-").isdigit() else 0
        if 0 <= number < options["max_logprobs"]:
            raise ValueError(
                f"--max-logprobs must be at least {options['max_logprobs']} for {slots} slots (2 x slots + 4): the "
                f"record of a position takes as many; got {text}"
            )
        options["max_logprobs"] = number
    if cpu.installed() and not {"--enforce-eager", "--no-enforce-eager"} & set(rest):
        options["enforce_eager"] = True  # the interpreter runs nothing that is compiled
    if any(word.partition("=")[0] == WEIGHTS for word in rest):
        os.environ.setdefault("VLLM_SERVER_DEV_MODE", "1")  # the routes by which TRL sends weights
    ours = ["--middleware", MIDDLEWARE]
    for name, value in options.items():
        ours.append(f"--{name.replace('_', '-')}")
        if isinstance(value, list):
            ours += value
        elif value is not True:
            ours.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *ours, *rest]


def run(model: str, words: list[str], slots: int = SLOTS, thoughts: int = THOUGHTS) -> None:
    """Become that program; arguments as in `command`."""
    made = command(model, words, slots, thoughts)
    sys.stdout.flush()
    os.execv(made[0], made)


def check_servable(model: str) -> None:
    """Raises ValueError for an adapter's folder."""
    from pathlib import Path

    if is_adapter(Path(model)):
        raise ValueError(
            f"model {model} is an adapter, and vLLM loads whole models: "
            "PeftModel.merge_and_unload() and save_pretrained make one"
        )


def take(words: list[str], names: tuple[str, ...]) -> tuple[dict[str, list[str]], list[str]]:
    """The values of some options, and the other words; an option may be written with _ and with =."""
    given: dict[str, list[str]] = {name: [] for name in names}
    rest, current = [], None
    for word in words:
        if word.startswith("-") and not word.lstrip("-").isdigit():
            option, equals, value = word.partition("=")
            name = option.replace("_", "-")
            if name.partition(".")[0] in names and name not in names:
                raise ValueError(f"{option}: give {name.partition('.')[0]} as one JSON object")
            current = name if name in names else None
            if current and equals:
                given[current].append(value)
                current = None
            if name in names:
                continue
        elif current:
            given[current].append(word)
            continue
        rest.append(word)
    return given, rest


def check_options(words: list[str]) -> None:
    """Raises ValueError for an option of `vllm serve` that soft rows cannot have."""
    for i, word in enumerate(words):
        option, _, value = word.partition("=")
        name = option.replace("_", "-") if option.startswith("--") else option
        if name.partition(".")[0] in REFUSED:
            name = name.partition(".")[0]
            raise ValueError(f"{name} is not available: {REFUSED[name]}; leave it out")
        if name in PIPELINE and (value or (words[i + 1 : i + 2] or ["1"])[0]) != "1":
            raise ValueError(f"{name} must be 1: what is drawn on the last stage is fed on the first; use -tp")


def _merged(option: str, text: str, key: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"--{option} must be a JSON object, got {text!r}")
    if key in value:
        raise ValueError(f"--{option}: {key} is set by rl-soft serve; leave it out")
    return value
