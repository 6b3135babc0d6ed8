"""One recipe from start to end, as `rl-soft train RECIPE` runs it.

    start    rows, warm start (run first where it is missing), model, trainer
    before   Pass@k of the model that RL starts from       RL only, as are `after` and `report`
    fit      training, from the last checkpoint if there is one; with eval_strategy Pass@k every eval_steps
    after    Pass@k of the trained model
    report   report.md, report.html, passk.png

Methods codi, sft, icot and coconut end after `fit`, with output_dir/model. What is finished is skipped, so that the
same command resumes a run that was stopped anywhere.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import PrinterCallback, ProgressCallback
from trl import GRPOConfig

from rl_soft.config.recipe import (
    RL_METHODS,
    Recipe,
    batch_plan,
    check_output_dir,
    trainer_class,
    trainer_defaults,
    warm_start_of,
    write_config,
)
from rl_soft.config.refusals import training_cuts
from rl_soft.data import sources as data
from rl_soft.evaluation.card import model_card
from rl_soft.evaluation.curve import DURING, METRICS, report_run
from rl_soft.evaluation.samples import accuracy, evaluate
from rl_soft.files import write_atomic
from rl_soft.model import policy
from rl_soft.model.devices import device
from rl_soft.model.gate import add_gate
from rl_soft.model.quantised import check_divided, to_store
from rl_soft.thoughts.fit import check_characters, check_rows
from rl_soft.thoughts.layout import Layout, check_texts
from rl_soft.train.coconut import coconut_trainer
from rl_soft.train.codi import codi_trainer
from rl_soft.train.columns import as_dataset
from rl_soft.train.evaluations import Curve
from rl_soft.train.grpo import SoftGRPOTrainer
from rl_soft.train.icot import icot_trainer
from rl_soft.train.ppo import SoftPPOConfig, SoftPPOTrainer
from rl_soft.train.precision import settled, uses_deepspeed
from rl_soft.train.ready import Rows, check_rl, load_rows, world_size
from rl_soft.train.runtime.callbacks import Finished, Interrupt, KnownFailures, MetricsFile, Progress, Validate
from rl_soft.train.runtime.checkpoints import (
    Checkpoints,
    check_resumable,
    divided,
    last_checkpoint,
    set_aside_unfinished,
)
from rl_soft.train.runtime.hub import Hub
from rl_soft.train.runtime.processes import (
    as_trained,
    check_processes,
    gathered,
    lost_processes,
    prepare_devices,
)
from rl_soft.train.runtime.sharded import check_recipe, prepare_fsdp, whole_model
from rl_soft.train.sft import sft_trainer
from rl_soft.train.start import check_thinking, lora_config, starting_policy
from rl_soft.train.supervised import usable_rows

logger = logging.getLogger("rl_soft")

# method -> what makes its trainer, and arguments of the trainer that must be so
SUPERVISED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "codi": (codi_trainer, {}),
    "sft": (sft_trainer, {}),
    "icot": (icot_trainer, {"remove_unused_columns": False}),
    "coconut": (coconut_trainer, {"remove_unused_columns": False}),
}


def run(recipe: Recipe) -> Path:
    """Run a recipe, or what is left of it.

    Args:
        recipe: made by `rl_soft.load_recipe`.

    Returns:
        The run directory, `recipe.output_dir`.

    Raises:
        ValueError: a mistake in the recipe or its data, told before anything is trained; a directory that holds
            another run.
    """
    recipe = settled(recipe, uses_deepspeed())
    check_recipe(recipe)
    rewards = check_rl(recipe) if recipe.method in RL_METHODS else []
    rows = load_rows(recipe)
    warm_start = warm_start_of(recipe)
    if warm_start is not None:
        finish(warm_start)
    begin(recipe)
    hub = Hub(recipe.training, recipe.output_dir) if recipe.training.get("push_to_hub") and is_first() else None
    callbacks = [] if hub is None else [hub]
    if recipe.method in RL_METHODS:
        train_rl(recipe, warm_start, rows, rewards, callbacks)
    else:
        train_supervised(recipe, warm_start, rows, callbacks)
    if hub is not None:
        hub.finish()
    logger.info("model: %s", recipe.output_dir / "model")
    return recipe.output_dir


def finish(warm_start: Recipe) -> None:
    """See that the result of a warm start is there."""
    warm_start = settled(warm_start, uses_deepspeed())
    if check_output_dir(warm_start) and (warm_start.output_dir / "model").exists():
        logger.info("warm start: %s", warm_start.output_dir / "model")
        return
    logger.info("warm start %s is missing; running %s first", warm_start.output_dir, warm_start.path)
    run(warm_start)
    gc.collect()  # its trainer and model hold each other, and this run needs their memory
    AcceleratorState._reset_state()  # the next trainer reads its DeepSpeed settings afresh


def is_first() -> bool:
    """Whether this process is the one that writes, before there is a trainer to ask."""
    return int(os.environ.get("RANK", "0")) == 0


def begin(recipe: Recipe) -> None:
    """Make or check the run directory, and prepare the devices."""
    resuming = check_output_dir(recipe)
    prepare_devices()
    prepare_fsdp()
    if is_first():
        logger.info("%s %s in %s", "resuming" if resuming else "starting", recipe.path, recipe.output_dir)
        write_config(recipe)
    for name, value in dataclasses.asdict(recipe.trackers).items():
        if value is not None:
            os.environ[name.upper()] = value  # where wandb reads it


# ---------------------------------------------------------------------------------------------------------------------
# RL: start, before, fit, after, report


@dataclass
class Start:
    """What a run of RL works with."""

    recipe: Recipe
    policy: policy.Policy
    layout: Layout
    args: GRPOConfig
    test: list[data.Row]


def train_rl(
    recipe: Recipe, warm_start: Recipe | None, rows: Rows, rewards: list[Callable], callbacks: list[Any]
) -> None:
    start = start_rl(recipe, warm_start, rows)
    model_folder = recipe.output_dir / "model"
    if not model_folder.exists():
        with gathered(start.policy.model):
            evaluate_as(start, "before RL", recipe.output_dir / "eval_before", start.policy.model)
        trainer = rl_trainer(start, rows.train, rewards)
        boundary = recipe.extra.updates_per_rollout * start.args.num_iterations
        shown = {"reward": "reward", "entropy": "entropy", "clip_ratio/region_mean": "clip", "eval_pass@1": "pass@1"}
        fit(trainer, recipe, shown, boundary, callbacks)
        take_over_records(trainer, recipe.output_dir)
        save(trainer, recipe, start.policy.tokenizer)
        with whole_model(trainer) as model:
            evaluate_as(start, "after RL", recipe.output_dir / "eval_after", model)
    else:
        m = recipe.model
        made = policy.load_policy(str(model_folder), m.dtype or "float32", m.attn_implementation)
        model = made.model.to(start.args.device)
        with gathered(model):
            evaluate_as(start, "after RL", recipe.output_dir / "eval_after", model)
    if start.args.process_index == 0 and recipe.data.eval_problems:
        report(recipe)


def start_rl(recipe: Recipe, warm_start: Recipe | None, rows: Rows) -> Start:
    start, thinking = starting_policy(recipe, warm_start), recipe.thinking
    check_thinking(thinking, start.thinking, str(recipe.path))
    thinking.support_size(start.model.config.vocab_size)
    layout = Layout(thinking, start.tokenizer)
    check_texts(layout)
    context = policy.context_length(start.model)
    check_rows(rows.train, layout, context, recipe.data.dataset)
    check_rows(rows.test, layout, context, recipe.data.eval_dataset or recipe.data.dataset)
    values = {
        "max_completion_length": layout.max_completion_length,
        "temperature": thinking.temperature,
        **batch_plan(recipe, world_size()),
    }
    if recipe.values.get("eval_strategy", "no") != "no":  # of TRL's own loop, which is not run
        values["num_generations_eval"] = 1
    args = (SoftPPOConfig if recipe.method == "ppo" else GRPOConfig)(**training_values(recipe) | values)
    check_processes(args)
    check_divided(start.model, divided(args))
    if thinking.switch == "gate":
        add_gate(policy.language_model(start.model))  # the evaluation before RL has it, too
    start.model.to(args.device)
    return Start(recipe, start, layout, args, rows.test)


def rl_trainer(start: Start, rows: list[data.Row], rewards: list[Callable]) -> SoftGRPOTrainer:
    recipe, extra, model = start.recipe, start.recipe.extra, start.policy.model
    own = ["ratio", "rest_weight", "thought_epsilon", "chunk_size", "order"]
    if recipe.method == "grpo":
        own += ["filter_groups", "resample", "max_resamples"]
    if recipe.method == "ppo":
        own += ["gamma", "lam", "vf_coef", "value_clip", "value_learning_rate"]
    evaluates = start.args.eval_strategy != "no"
    trainer = (SoftPPOTrainer if recipe.method == "ppo" else SoftGRPOTrainer)(
        model,
        rewards,
        start.args,
        as_dataset(rows),
        as_dataset(start.test) if evaluates else None,
        processing_class=start.policy.tokenizer,
        peft_config=None if hasattr(model, "peft_config") else lora_config(recipe),
        thinking=recipe.thinking,
        **{name: getattr(extra, name) for name in own},
    )
    if evaluates:
        add_curve(trainer, start)
    return trainer


def evaluate_as(start: Start, name: str, folder: Path, model: Any) -> None:
    """Pass@k records of `model` into `folder`; the policy is the one that is trained, cuts included."""
    recipe = start.recipe
    if not recipe.data.eval_problems:
        return
    source = str(recipe.output_dir / "model")
    if name == "before RL":
        source = str(recipe.model.warm_start or recipe.model.model_name_or_path)
    with as_trained(model, start.args):
        evaluate(
            model,
            start.layout,
            start.test,
            folder,
            name=name,
            model_name=source,
            dataset=recipe.data.eval_dataset or recipe.data.dataset,
            samples=recipe.eval.eval_samples,
            seed=recipe.eval.eval_seed,
            batch_size=recipe.eval.eval_batch_size,
            config=recipe.values,
            decoding=training_cuts(recipe.values, start.layout.thinking, recipe.extra.ratio, recipe.extra.order),
        )


def add_curve(trainer: SoftGRPOTrainer, start: Start) -> None:
    """Evaluations while training, with the problems, samples and noise of those before and after."""

    def evaluate_step(folder: Path, model: Any) -> None:
        evaluate_as(start, folder.name.replace("-", " "), folder, model)

    trainer.curve = Curve(trainer, evaluate_step, start.recipe.output_dir, start.recipe.eval.eval_k)


def take_over_records(trainer: SoftGRPOTrainer, run: Path) -> None:
    """Where the model that training ended with was evaluated already, `eval_after` starts from those records."""
    state = trainer.state
    step = state.best_global_step if trainer.args.load_best_model_at_end else state.global_step
    made, records = run / DURING / f"step-{step}", run / "eval_after" / "records.jsonl"
    if trainer.is_world_process_zero() and (made / METRICS).exists() and not records.exists():
        records.parent.mkdir(exist_ok=True)
        write_atomic(records, (made / "records.jsonl").read_text())


def report(recipe: Recipe) -> None:
    out = recipe.output_dir
    figures = report_run(out)
    write_atomic(out / "model" / "README.md", model_card(out / "model", recipe.values, figures))
    logger.info("%s; report: %s", figures["title"], out / "report.md")


# ---------------------------------------------------------------------------------------------------------------------
# Supervised methods: start, fit


def train_supervised(recipe: Recipe, warm_start: Recipe | None, rows: Rows, callbacks: list[Any]) -> None:
    """CODI and what it is compared with: they learn from worked solutions, without rollouts of their own."""
    if (recipe.output_dir / "model").exists():
        return
    make_trainer, forced = SUPERVISED[recipe.method]
    args = trainer_class(recipe.method)(**training_values(recipe) | forced)
    check_processes(args)
    start = starting_policy(recipe, warm_start)
    check_divided(start.model, divided(args))
    start.tokenizer.chat_template = None  # questions are trained as they are, and evaluated so
    layout = Layout(recipe.thinking, start.tokenizer)
    recipe.thinking.support_size(start.model.config.vocab_size)
    check_characters([*rows.train, *rows.test], layout, recipe.data.dataset)
    train = usable_rows(
        rows.train,
        layout,
        policy.context_length(start.model),
        recipe.extra.max_row_tokens,
        getattr(recipe.extra, "worked_steps", True),
        recipe.data.dataset,
        getattr(recipe.extra, "drop_last_step", False),
    )
    held_out = min(recipe.extra.validation_problems, len(train) // 5)
    validation, train = train[:held_out], train[held_out:]
    trainer = make_trainer(recipe, start, args, layout, train)
    if validation:
        validate_every(trainer, recipe, layout, validation)
    fit(trainer, recipe, {"loss": "loss", "validation_accuracy": "val"}, 1, callbacks)
    save(trainer, recipe, start.tokenizer)
    trainer.accelerator.free_memory()  # DeepSpeed's hooks would hold the model for good


def validate_every(trainer: Any, recipe: Recipe, layout: Layout, rows: list[data.Row]) -> None:
    """Accuracy on rows held out of training, every `validation_every` steps."""

    def validate() -> float:
        with whole_model(trainer) as model:
            return accuracy(model, layout, rows, recipe.eval.eval_seed, recipe.eval.eval_batch_size)

    callback = Validate(validate, recipe.extra.validation_every, recipe.extra.stop_at_accuracy)
    callback.trainer = trainer
    trainer.add_callback(callback)


# ---------------------------------------------------------------------------------------------------------------------
# Parts that all methods share


def training_values(recipe: Recipe) -> dict[str, Any]:
    """Keyword arguments of the trainer's configuration: our defaults, then the recipe's keys."""
    # On a CPU `use_cpu` must be an argument of the trainer: as an accelerate setting or in the environment it turns
    # DeepSpeed or the second process off without a word.
    defaults = trainer_defaults(recipe.method) | {"use_cpu": device() == "cpu", "bf16": False}
    values = {**defaults, **recipe.training, "output_dir": str(recipe.output_dir)}
    values.pop("push_to_hub", None)  # `runtime.hub` sends the model
    if recipe.values.get("eval_strategy", "no") != "no":
        values["metric_for_best_model"] = values.get("metric_for_best_model") or "pass@1"
    return values


def fit(trainer: Any, recipe: Recipe, shown: dict[str, str], boundary: int, callbacks: list[Any]) -> None:
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
    known = [KnownFailures()] if recipe.method in RL_METHODS else []  # a supervised loss is to bring the entropy down
    for added in (*known, interrupt, Checkpoints(trainer.args), *callbacks):
        trainer.add_callback(added)
    if trainer.is_world_process_zero():
        set_aside_unfinished(recipe.output_dir)
    last = last_checkpoint(recipe.output_dir)
    if last is not None:
        check_resumable(last, trainer.args)
    with interrupt, lost_processes():
        try:
            trainer.train(resume_from_checkpoint=str(last) if last else None)
        except Finished:
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
                trainer._load_best_model()
    if interrupt.stopped:
        if trainer.is_world_process_zero():
            logger.info("stopped at step %d with a checkpoint; the same command resumes", trainer.state.global_step)
        raise SystemExit(130)


def save(trainer: Any, recipe: Recipe, tokenizer: Any) -> None:
    """The trained model into output_dir/model, by all processes together."""
    main = trainer.is_world_process_zero()
    folder = recipe.output_dir / "model"
    model = trainer.accelerator.unwrap_model(trainer.model)
    policy.save(folder, trainer.save_model, tokenizer, recipe.thinking, main, to_store(model))
    if main:
        write_atomic(folder / "README.md", model_card(folder, recipe.values))
    PartialState().wait_for_everyone()
