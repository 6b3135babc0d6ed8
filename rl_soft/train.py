"""One recipe from start to end: data, model, (warm start,) training, evaluation, report.

    run(recipe)  codi:  train_codi  -> output_dir/model
                 grpo:  train_codi if the warm start is missing, evaluate before, SoftGRPOTrainer.train, evaluate
                        after, report.md and passk.png
                 ppo:   the same with SoftPPOTrainer

Stages that are finished are skipped, so that the same command resumes a run that was stopped anywhere.
"""

from __future__ import annotations

import difflib
import importlib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from rl_soft import data, policy
from rl_soft.config import Recipe, batch_plan, check_output_dir, device_defaults, load_recipe, write_config
from rl_soft.evaluate import accuracy, check_golds, evaluate
from rl_soft.guards import (
    Checkpoints,
    KnownFailures,
    check_resumable,
    last_checkpoint,
    lost_processes,
    set_aside_unfinished,
)
from rl_soft.layout import Layout, Thinking

logger = logging.getLogger("rl_soft")


def run(recipe: Recipe) -> Path:
    """Run a recipe, or what is left of it; returns the run directory."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.method != "codi":
        batch_plan(recipe, world_size)  # before anything is trained
    rows = load_rows(recipe)
    warm_start = warm_start_of(recipe)
    if warm_start is not None and check_output_dir(warm_start) and (warm_start.output_dir / "model").exists():
        logger.info("warm start: %s", warm_start.output_dir / "model")
    elif warm_start is not None:
        logger.info("warm start %s is missing; running %s first", warm_start.output_dir, warm_start.path)
        run(warm_start)
        AcceleratorState._reset_state()  # the next trainer reads its DeepSpeed settings afresh
    resuming = check_output_dir(recipe)
    prepare_devices()
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("%s %s in %s", "resuming" if resuming else "starting", recipe.path, recipe.output_dir)
        write_config(recipe)
    if recipe.method == "codi":
        train_codi(recipe, *rows)
    else:
        train_rl(recipe, warm_start, *rows)
    return recipe.output_dir


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def train_codi(recipe: Recipe, train: list[data.Row], test: list[data.Row]) -> None:
    from transformers import TrainingArguments
    from trl.models import unwrap_model_for_generation

    from rl_soft.codi import CodiRows, CodiTrainer, StopAtAccuracy

    if (recipe.output_dir / "model").exists():
        return
    args = TrainingArguments(**training_values(recipe, remove_unused_columns=False, label_names=["student_labels"]))
    if args.gradient_checkpointing:
        raise ValueError(
            "gradient_checkpointing is not available for codi: gradients flow from the answer to the thoughts through "
            "the cache, which checkpointed layers drop; lower per_device_train_batch_size instead"
        )
    check_processes(args)
    start = starting_policy(recipe, None)
    thinking = recipe.thinking
    layout = Layout(thinking, start.tokenizer)
    thinking.support_size(start.model.config.vocab_size)
    held_out = min(recipe.extra.validation_problems, len(train) // 5)
    validation, train = train[:held_out], train[held_out:]
    data.assert_disjoint(train, test)
    without_steps = sum(not row.steps for row in train)
    if without_steps == len(train):
        raise ValueError(f"dataset {recipe.data.dataset} has no worked steps; CODI distils them")

    trainer = CodiTrainer(
        start.model, args, layout=layout, codi=recipe.extra, train_dataset=CodiRows(train, recipe.seed)
    )

    def validate() -> float:
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            return accuracy(model, layout, validation, recipe.eval.eval_seed, recipe.eval.eval_batch_size)

    stop = StopAtAccuracy(validate, recipe.extra)
    stop.trainer = trainer
    trainer.add_callback(stop)
    fit(trainer, recipe, {"loss": "loss", "validation_accuracy": "val"}, boundary=1)
    policy.save(
        recipe.output_dir / "model", trainer.save_model, start.tokenizer, thinking, trainer.is_world_process_zero()
    )
    PartialState().wait_for_everyone()


def train_rl(recipe: Recipe, warm_start: Recipe | None, train: list[data.Row], test: list[data.Row]) -> None:
    from datasets import Dataset
    from trl.models import unwrap_model_for_generation

    config_class, trainer_class, options = rl_classes(recipe)
    plan = batch_plan(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    start = starting_policy(recipe, warm_start)
    thinking = recipe.thinking
    check_thinking(recipe, start.thinking)
    thinking.support_size(start.model.config.vocab_size)
    layout = Layout(thinking, start.tokenizer)
    args = config_class(
        **{
            "disable_dropout": True,  # with dropout on, the recomputed density is not the rollout's
            "gradient_checkpointing": False,
            **training_values(recipe),
            **plan,
            "max_completion_length": layout.max_completion_length,
            "temperature": thinking.temperature,
        }
    )
    check_processes(args)
    main = args.process_index == 0

    def evaluation(name: str, model: Any, source: Any) -> None:
        if recipe.data.eval_problems:
            evaluate(
                model,
                layout,
                test,
                recipe.output_dir / f"eval_{name}",
                name=f"{name} RL",
                model_name=str(source),
                dataset=recipe.data.eval_dataset or recipe.data.dataset,
                samples=recipe.eval.eval_samples,
                seed=recipe.eval.eval_seed,
                batch_size=recipe.eval.eval_batch_size,
                config=recipe.values,
            )

    start.model.to(args.device)
    trained = (recipe.output_dir / "model").exists()
    if not trained:
        with gathered(start.model):
            evaluation("before", start.model, recipe.model.warm_start or recipe.model.model_name_or_path)
        trainer = trainer_class(
            start.model,
            reward_funcs=reward_functions(recipe.extra.rewards),
            args=args,
            train_dataset=Dataset.from_list([{"prompt": r.question, **row_columns(r)} for r in train]),
            processing_class=start.tokenizer,
            peft_config=lora_config(recipe) if recipe.model.use_peft else None,
            layout=layout,
            ratio=recipe.extra.ratio,
            rest_weight=recipe.extra.rest_weight,
            thought_epsilon=recipe.extra.thought_epsilon,
            chunk_size=recipe.extra.chunk_size,
            **options,
        )
        boundary = recipe.extra.updates_per_rollout * args.num_iterations
        fit(trainer, recipe, {"reward": "reward", "entropy": "entropy", "clip_ratio/region_mean": "clip"}, boundary)
        policy.save(recipe.output_dir / "model", trainer.save_model, start.tokenizer, thinking, main)
        PartialState().wait_for_everyone()
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            evaluation("after", model, recipe.output_dir / "model")
    else:
        model = policy.load(str(recipe.output_dir / "model"), recipe.model.dtype).model.to(args.device)
        with gathered(model):
            evaluation("after", model, recipe.output_dir / "model")
    if main and recipe.data.eval_problems:
        report(recipe)


def report(recipe: Recipe) -> None:
    from rl_soft.records import write_atomic
    from rl_soft.render import model_card
    from rl_soft.report import compare

    out = recipe.output_dir
    figures = compare(
        [out / "eval_before", out / "eval_after"],
        out=out,
        names=["before RL", "after RL"],
        metrics=out / "metrics.jsonl",
        ks=recipe.eval.eval_k,
    )
    write_atomic(out / "model" / "README.md", model_card(out, figures, recipe.values))
    logger.info("%s; report: %s", figures["title"], out / "report.md")


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a stage


def warm_start_of(recipe: Recipe) -> Recipe | None:
    """The warm start's recipe, with this run's seed; its path is relative to the working folder or to this recipe."""
    name = recipe.model.warm_start
    if name is None:
        return None
    path = next((p for p in (Path(name), recipe.path.parent / name) if p.exists()), Path(name))
    return load_recipe(path, {"seed": recipe.seed})


def starting_policy(recipe: Recipe, warm_start: Recipe | None) -> policy.Policy:
    m = recipe.model
    if m.model_config:
        return policy.make(m.model_config, m.vocabulary or "", recipe.seed, m.dtype)
    source = str(warm_start.output_dir / "model") if warm_start is not None else str(m.model_name_or_path)
    start = policy.load(source, m.dtype, m.attn_implementation)
    if recipe.thinking.phase == "latent" and recipe.method == "codi":
        policy.add_thought_tokens(start)
    return start


def check_thinking(recipe: Recipe, trained: Thinking | None) -> None:
    """Refuse a checkpoint that was trained for another layout of its thoughts."""
    if trained is None:
        if recipe.thinking.phase == "latent":
            raise ValueError("phase latent needs a model trained for it; name a CODI recipe in warm_start")
        return
    for name in ("phase", "num_thoughts", "answer_prompt", "question_template"):
        ours, theirs = getattr(recipe.thinking, name), getattr(trained, name)
        if ours != theirs:
            raise ValueError(f"{name} is {ours!r} in {recipe.path}, but the checkpoint was trained with {theirs!r}")
    if trained.thought == "token" and recipe.thinking.thought != "token":
        raise ValueError(f"thought {recipe.thinking.thought} does not fit a checkpoint trained with thought token")


def load_rows(recipe: Recipe) -> tuple[list[data.Row], list[data.Row]]:
    """Training and held-out problems, which never overlap (asserted by question hash); their golds can be read."""
    d = recipe.data
    options, columns = d.dataset_options or {}, d.dataset_columns
    train = data.load(d.dataset, "train", d.train_size, d.data_seed_train, options, columns)
    check_golds(train, d.dataset)
    if not d.eval_problems:
        return train, []
    test = data.load(
        d.eval_dataset or d.dataset,
        "evaluation",
        d.eval_problems,
        d.data_seed_eval,
        (d.eval_dataset_options or {}) if d.eval_dataset else options,
        columns,
    )
    check_golds(test, d.eval_dataset or d.dataset)
    data.assert_disjoint(train, test)
    return train, test


def row_columns(row: data.Row) -> dict[str, Any]:
    return {"id": row.id, "answer": row.answer, "answer_type": row.answer_type, "source": row.source}


def rl_classes(recipe: Recipe) -> tuple[Any, Any, dict[str, Any]]:
    """The method's configuration, its trainer, and the keyword arguments that only this trainer has."""
    if recipe.method == "ppo":
        from rl_soft.ppo import SoftPPOConfig, SoftPPOTrainer

        names = ("gamma", "lam", "vf_coef", "value_clip", "value_learning_rate")
        return SoftPPOConfig, SoftPPOTrainer, {name: getattr(recipe.extra, name) for name in names}
    from trl import GRPOConfig

    from rl_soft.rl import SoftGRPOTrainer

    return GRPOConfig, SoftGRPOTrainer, {}


def reward_functions(entries: list[str | dict[str, dict]]) -> list[Callable]:
    """Reward functions by name (`math_accuracy`), dotted path (`my_module.my_reward`), or, for those that take
    parameters, a mapping (`{ThoughtCost: {cost: 0.01}}`)."""
    functions = []
    for entry in entries:
        name, parameters = next(iter(entry.items())) if isinstance(entry, dict) else (entry, None)
        module, _, attribute = name.rpartition(".")
        try:
            function = getattr(importlib.import_module(module or "rewards"), attribute)
        except (ImportError, AttributeError):
            import rewards

            near = difflib.get_close_matches(name, rewards.__all__, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(rewards.__all__)}, or a dotted path"
            raise ValueError(f"rewards: cannot find {name!r}{hint}") from None
        if isinstance(function, type):
            try:
                function = function(**(parameters or {}))
            except TypeError as error:
                raise ValueError(f"rewards: {name} {parameters or {}}: {error}") from None
        functions.append(function)
    return functions


def lora_config(recipe: Recipe) -> Any:
    from peft import LoraConfig

    m = recipe.model
    return LoraConfig(
        r=m.lora_r,
        lora_alpha=m.lora_alpha,
        lora_dropout=0.0,  # dropout would make the recomputed density another one
        target_modules=m.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def training_values(recipe: Recipe, **forced: Any) -> dict[str, Any]:
    """Keyword arguments of the trainer's configuration: our defaults, the recipe's keys, what must be so."""
    return {
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 2,
        "lr_scheduler_type": "constant",
        **device_defaults(),
        **recipe.training,
        **forced,
        "output_dir": str(recipe.output_dir),
    }


def prepare_devices() -> None:
    """CPU processes share the cores; DeepSpeed's shared-memory op is optional and would be compiled at start-up."""
    disable_progress_bar()  # of the shards of a checkpoint; ours stays
    if not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and not torch.cuda.is_available():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gathered(model: Any) -> Any:
    """Whole weights on every process, where ZeRO-3 has partitioned them while they were loaded."""
    partitioned = [p for p in model.parameters() if hasattr(p, "ds_id")]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned)


def check_processes(args: Any) -> None:
    """The launcher's wishes must have come true: on a CPU a wrong setting makes N independent runs without a word."""
    state = args.distributed_state
    world = int(os.environ.get("WORLD_SIZE", "1"))
    kind = "DEEPSPEED" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else None
    actual = "DEEPSPEED" if args.deepspeed_plugin is not None else state.distributed_type.value
    if state.num_processes != world or (kind and actual != kind):
        raise ValueError(
            f"launched {world} processes ({kind or 'no DeepSpeed'}); the trainer sees {state.num_processes} ({actual})"
        )
    if args.process_index == 0:
        stage = f" ZeRO-{args.deepspeed_plugin.zero_stage}" if args.deepspeed_plugin is not None else ""
        logger.info("%d process(es), %s%s, device %s", world, actual, stage, args.device)


def fit(trainer: Any, recipe: Recipe, shown: dict[str, str], boundary: int) -> None:
    """Train, from the last checkpoint if there is one; Ctrl-C leaves a checkpoint."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(MetricsFile(recipe.output_dir / "metrics.jsonl"))
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress(recipe.path.stem, shown))
    save_steps = trainer.args.save_steps
    if trainer.args.save_strategy == "steps" and save_steps % boundary:
        logger.info("save_steps %g: a checkpoint waits for its rollout's last step (%d each)", save_steps, boundary)
    interrupt = Interrupt(boundary)
    for added in (KnownFailures(), interrupt, Checkpoints(trainer.args)):
        trainer.add_callback(added)
    if trainer.is_world_process_zero():
        set_aside_unfinished(recipe.output_dir)
    last = last_checkpoint(recipe.output_dir)
    if last is not None:
        check_resumable(last, trainer.args)
    with interrupt, lost_processes(), suppress(Finished):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if interrupt.stopped:
        if trainer.is_world_process_zero():
            logger.info("stopped at step %d with a checkpoint; the same command resumes", trainer.state.global_step)
        raise SystemExit(130)


class MetricsFile(TrainerCallback):
    """Append every log to metrics.jsonl, the ground truth; after a resume the last line of a step counts."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n"):
            with self.path.open("a") as file:
                file.write("\n")  # a killed run left half a line

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in logs.items()}
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, **finite}) + "\n")


class Progress(TrainerCallback):
    """One line on rank 0: steps, time left, and the few numbers worth watching."""

    def __init__(self, name: str, shown: dict[str, str]):
        self.name, self.shown = name, shown
        self.values: dict[str, str] = {}
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.name,
                unit="step",
                mininterval=0.5 if sys.stderr.isatty() else 15.0,  # a log file gets a line now and then
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.bar is not None and logs:
            present = {short: logs[key] for key, short in self.shown.items() if logs.get(key) is not None}
            self.values |= {short: f"{value:.3g}" for short, value in present.items()}
            self.bar.set_postfix(self.values, refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
            self.bar.close()


class Finished(Exception):
    """A checkpoint of the last step was loaded: there is nothing left to train."""


class Interrupt(TrainerCallback):
    """SIGINT or SIGTERM on any process: all of them save at the next rollout boundary and stop.

    A buffered rollout is not part of a checkpoint, so every checkpoint waits for such a boundary.
    """

    def __init__(self, boundary: int):
        self.boundary, self.asked, self.stopped = boundary, False, False
        self.owed = False  # a checkpoint that waits for the boundary
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Interrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self.asked = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # the host would train one step more before it looks
            raise Finished

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step % self.boundary and not control.should_training_stop:
            self.owed |= control.should_save
            control.should_save = False
            return control
        control.should_save |= self.owed
        self.owed = False
        asked = torch.tensor(float(self.asked), device=args.device)
        processes = PartialState()
        if processes.num_processes > 1:
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if asked > 0:
            self.stopped = control.should_save = control.should_training_stop = True
        return control


def describe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, for --dry-run."""
    import yaml

    return yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True)
