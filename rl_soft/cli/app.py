"""The command line: `rl-soft COMMAND`, `python -m rl_soft RECIPE`, and what a recipe runs when Python is given it.

Imports are lazy: `rl-soft report` works without torch.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def main(argv: list[str] | str | None = None) -> None:
    """Run a command; a user's mistake ends in one line on stderr and exit code 2.

    Args:
        argv: the arguments; or the path of a recipe, when the recipe itself is the program (its last line).
    """
    if isinstance(argv, str):
        argv = ["train", argv, *sys.argv[1:]]
    arguments = sys.argv[1:] if argv is None else argv
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL pings at trainer construction otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # the hosts' about each other; not a user's
    logging.basicConfig(format="[rl_soft] %(message)s", level=logging.WARNING)
    rank = int(os.environ.get("RANK", "0"))
    logging.getLogger("rl_soft").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        _dispatch(list(arguments))
    except BrokenPipeError:  # `| head` has read enough; what is left in the buffer must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        if os.environ.get("RL_SOFT_DEBUG"):
            raise
        if rank:
            time.sleep(3)  # a mistake that all processes see is told by the first, and its exit ends the others
        where = f" (process {rank})" if rank else ""
        print(f"rl_soft: error{where}: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _dispatch(arguments: list[str]) -> None:
    from rl_soft.cli.help import COMMANDS, command_help, usage

    command = arguments[0] if arguments else "--help"
    if command.endswith((".yaml", ".yml")):
        command, arguments = "train", ["train", *arguments]
    rest = arguments[1:]
    if command in ("-h", "--help", "help"):
        print(usage(), end="")
    elif command in COMMANDS and {"-h", "--help"} & set(rest):
        print(command_help(command, rest), end="")
    elif command == "eval" or (command == "check" and rest[:1] == ["eval"]):
        _eval(rest if command == "eval" else rest[1:], only_check=command == "check")
    elif command in ("train", "check"):
        if not rest:
            raise ValueError(f"{command} needs a recipe, for example recipes/grpo_gumbel.yaml")
        from rl_soft.config.recipe import load_recipe, parse_overrides

        recipe = load_recipe(rest[0], parse_overrides(rest[1:]))
        from rl_soft.train import pipeline as train

        if command == "check":
            print(train.describe(recipe), end="")
        else:
            train.run(recipe)
    elif command == "generate":
        _generate(rest)
    elif command == "estimate":
        _estimate(rest)
    elif command == "report":
        _report(rest)
    elif command == "compare":
        _compare(rest)
    elif command == "analyze":
        _analyze(rest)
    elif command == "fetch":
        from rl_soft.model.fetch import fetch

        print(fetch(rest[0] if rest else "smollm2"))
    elif command == "env":
        from rl_soft.evaluation.provenance import versions

        _env(versions())
    else:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        raise ValueError(f"unknown command {command!r}" + (f"; did you mean {near[0]}?" if near else ""))


def _eval(rest: list[str], only_check: bool) -> None:
    if not rest or rest[0].startswith("-"):
        raise ValueError("eval needs a model: rl-soft eval MODEL --dataset NAME --output_dir DIR [--key value ...]")
    from rl_soft.config.recipe import load_decoder, parse_overrides

    overrides = parse_overrides(rest[1:])
    load_decoder(rest[0], overrides)  # a mistake is told before torch is imported
    from rl_soft.cli import eval as eval_command

    if only_check:
        print(eval_command.describe(rest[0], overrides), end="")
    else:
        eval_command.run(rest[0], overrides)


def _generate(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        raise ValueError("generate needs a model: rl-soft generate MODEL --prompt TEXT [--key value ...]")
    from rl_soft.config.arguments import GenerateArguments
    from rl_soft.config.recipe import load_decoder, parse_overrides

    overrides = parse_overrides(rest[1:], texts=("prompt", "prompts", "output"))
    load_decoder(rest[0], overrides, GenerateArguments, "generate")
    from rl_soft.cli import generate as generate_command

    generate_command.run(rest[0], overrides)


def _estimate(rest: list[str]) -> None:
    if not rest or rest[0].startswith("-"):
        raise ValueError("estimate needs a recipe, for example recipes/grpo_gumbel.yaml")
    from rl_soft.config.recipe import load_recipe, parse_overrides

    overrides = parse_overrides(rest[1:])

    def number(key: str, default: int | None, least: int) -> Any:
        value = overrides.pop(key, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < least):
            raise ValueError(f"{key} must be a number of at least {least}, got {value!r}")
        return value

    memory = number("memory", None, 0)
    processes, zero, prompt_tokens = number("processes", 1, 1), number("zero", 0, 0), number("prompt_tokens", 256, 1)
    recipe = load_recipe(rest[0], overrides)
    from rl_soft.cli.estimate import describe, estimate

    made = estimate(recipe, processes, zero, prompt_tokens)
    print(describe(recipe, made, memory), end="")
    if memory is not None and made.peak > memory * 2**30:
        raise SystemExit(1)


def _report(rest: list[str]) -> None:
    if not rest:
        raise ValueError("report needs a run or an evaluation directory")
    from rl_soft.evaluation.records import read_header
    from rl_soft.evaluation.report import build, compare

    folder = Path(rest[0])
    if (folder / "eval_before").exists() and (folder / "eval_after").exists():
        import yaml

        compare(
            [folder / "eval_before", folder / "eval_after"],
            out=folder,
            names=["before RL", "after RL"],
            metrics=folder / "metrics.jsonl",
            ks=yaml.safe_load((folder / "config.yaml").read_text()).get("eval_k"),
        )
    else:
        build(folder, read_header(folder).get("config", {}).get("eval_k"))
    print(folder / "report.md")


def _compare(rest: list[str]) -> None:
    if "--out" not in rest[:-1]:
        raise ValueError("compare needs two evaluation directories or more, and --out DIR")
    from rl_soft.evaluation.report import compare

    at = rest.index("--out")
    out = Path(rest[at + 1])
    compare([Path(p) for p in rest[:at] + rest[at + 2 :]], out=out)
    print(out / "report.md")


def _analyze(rest: list[str]) -> None:
    if len(rest) < 2 or rest[1].startswith("-"):
        raise ValueError("analyze needs a kind and a model: rl-soft analyze probe MODEL --dataset NAME")
    from rl_soft.config.recipe import parse_overrides

    overrides = parse_overrides(rest[2:])
    from rl_soft.cli import analyze as analyze_command

    print(analyze_command.run(rest[0], rest[1], overrides), end="")


def _env(versions: dict[str, str]) -> None:
    import platform

    import torch

    print(f"python {platform.python_version()} on {platform.platform()}")
    for name, version in versions.items():
        print(f"{name} {version}")
    print(f"cpu cores {os.cpu_count()}")
    for i in range(torch.cuda.device_count()):
        print(f"gpu {i} {torch.cuda.get_device_name(i)}")
