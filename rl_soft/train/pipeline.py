"""One recipe from start to end: data, model, (warm start,) training, evaluation, report.

    run(recipe)  codi, sft, icot, coconut:  train_supervised  -> output_dir/model
                 grpo:  the warm start if it is missing, evaluate before, SoftGRPOTrainer.train, evaluate after,
                        report.md and passk.png
                 ppo:   the same with SoftPPOTrainer

Stages that are finished are skipped, so that the same command resumes a run that was stopped anywhere.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from transformers import PrinterCallback, ProgressCallback

from rl_soft.config.recipe import (
    RL_METHODS,
    Recipe,
    batch_plan,
    check_output_dir,
    device_defaults,
    trainer_class,
    trainer_defaults,
    write_config,
)
from rl_soft.data import sources as data
from rl_soft.evaluation.judging import check_golds
from rl_soft.evaluation.samples import accuracy, evaluate
from rl_soft.model import policy
from rl_soft.model.policy import context_length
from rl_soft.thoughts.layout import Layout, check_texts
from rl_soft.train.coconut import coconut_trainer
from rl_soft.train.codi import codi_trainer
from rl_soft.train.icot import icot_trainer
from rl_soft.train.reward_functions import reward_functions
from rl_soft.train.runtime.callbacks import Finished, Interrupt, KnownFailures, MetricsFile, Progress, Validate
from rl_soft.train.runtime.checkpoints import Checkpoints, check_resumable, last_checkpoint, set_aside_unfinished
from rl_soft.train.runtime.processes import as_trained, check_processes, gathered, lost_processes, prepare_devices
from rl_soft.train.start import check_thinking, lora_config, starting_policy, warm_start_of
from rl_soft.train.supervised import usable_rows

logger = logging.getLogger("rl_soft")


def run(recipe: Recipe) -> Path:
    """Run a recipe, or what is left of it; returns the run directory."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if recipe.method in RL_METHODS:
        batch_plan(recipe, world_size)  # before anything is trained
        reward_functions(recipe.extra.rewards)
    rows = load_rows(recipe)
    warm_start = warm_start_of(recipe)
    if warm_start is not None and check_output_dir(warm_start) and (warm_start.output_dir / "model").exists():
        logger.info("warm start: %s", warm_start.output_dir / "model")
    elif warm_start is not None:
        logger.info("warm start %s is missing; running %s first", warm_start.output_dir, warm_start.path)
        run(warm_start)
        gc.collect()  # its trainer and model hold each other, and this run needs their memory
        AcceleratorState._reset_state()  # the next trainer reads its DeepSpeed settings afresh
    resuming = check_output_dir(recipe)
    prepare_devices()
    if int(os.environ.get("RANK", "0")) == 0:
        logger.info("%s %s in %s", "resuming" if resuming else "starting", recipe.path, recipe.output_dir)
        write_config(recipe)
    stage = train_rl if recipe.method in RL_METHODS else train_supervised
    stage(recipe, warm_start, *rows)
    return recipe.output_dir


# ---------------------------------------------------------------------------------------------------------------------
# Stages


def train_supervised(recipe: Recipe, warm_start: Recipe | None, train: list[data.Row], test: list[data.Row]) -> None:
    """CODI and what it is compared with: they learn from worked solutions, without rollouts of their own."""
    from trl.models import unwrap_model_for_generation

    if (recipe.output_dir / "model").exists():
        return
    make_trainer, forced = SUPERVISED[recipe.method]
    args = trainer_class(recipe.method)(**training_values(recipe, **(forced | recipe.training)))
    check_processes(args)
    start = starting_policy(recipe, warm_start)
    start.tokenizer.chat_template = None  # questions are trained as they are, and evaluated so
    thinking = recipe.thinking
    layout = Layout(thinking, start.tokenizer)
    thinking.support_size(start.model.config.vocab_size)
    data.assert_disjoint(train, test)
    train = usable_rows(
        train,
        layout,
        context_length(start.model),
        recipe.extra.max_row_tokens,
        getattr(recipe.extra, "worked_steps", True),
        recipe.data.dataset,
        getattr(recipe.extra, "drop_last_step", False),
    )
    held_out = min(recipe.extra.validation_problems, len(train) // 5)
    validation, train = train[:held_out], train[held_out:]
    trainer = make_trainer(recipe, start, args, layout, train)

    def validate() -> float:
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            return accuracy(model, layout, validation, recipe.eval.eval_seed, recipe.eval.eval_batch_size)

    if validation:
        validation_every = Validate(validate, recipe.extra.validation_every, recipe.extra.stop_at_accuracy)
        validation_every.trainer = trainer
        trainer.add_callback(validation_every)
    fit(trainer, recipe, {"loss": "loss", "validation_accuracy": "val"}, boundary=1)
    policy.save(
        recipe.output_dir / "model", trainer.save_model, start.tokenizer, thinking, trainer.is_world_process_zero()
    )
    PartialState().wait_for_everyone()
    trainer.accelerator.free_memory()  # DeepSpeed's hooks would hold the model for good


def sft_trainer(recipe: Recipe, start: policy.Policy, args: Any, layout: Layout, rows: list[data.Row]) -> Any:
    from rl_soft.train.sft import sft_trainer

    adapter = lora_config(recipe)
    return sft_trainer(start.model, args, layout=layout, arguments=recipe.extra, rows=rows, peft_config=adapter)


# method -> its trainer, and the trainer's arguments that must be so
SUPERVISED: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "codi": (codi_trainer, {"remove_unused_columns": False, "label_names": ["student_labels"]}),
    "sft": (sft_trainer, {}),
    "icot": (icot_trainer, {"remove_unused_columns": False}),
    "coconut": (coconut_trainer, {"remove_unused_columns": False}),
}


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
    check_texts(layout)
    args = config_class(
        **{
            **training_values(recipe),
            **plan,
            "max_completion_length": layout.max_completion_length,
            "temperature": thinking.temperature,
        }
    )
    check_processes(args)
    main = args.process_index == 0

    def evaluation(name: str, model: Any, source: Any) -> None:
        if not recipe.data.eval_problems:
            return
        with as_trained(model, args):
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
            peft_config=None if hasattr(start.model, "peft_config") else lora_config(recipe),
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
        m = recipe.model
        saved = policy.load_policy(str(recipe.output_dir / "model"), m.dtype, m.attn_implementation)
        model = saved.model.to(args.device)
        with gathered(model):
            evaluation("after", model, recipe.output_dir / "model")
    if main and recipe.data.eval_problems:
        report(recipe)


def report(recipe: Recipe) -> None:
    from rl_soft.evaluation.render import model_card
    from rl_soft.evaluation.report import compare
    from rl_soft.files import write_atomic

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


def load_rows(recipe: Recipe) -> tuple[list[data.Row], list[data.Row]]:
    """Training and held-out problems, which never overlap (asserted by question hash); their golds can be read."""
    d = recipe.data
    options, columns = d.dataset_options or {}, d.dataset_columns
    train = data.load_rows(d.dataset, "train", d.train_size, d.data_seed_train, options, columns)
    check_golds(train, d.dataset)
    if not d.eval_problems:
        return train, []
    test = data.load_rows(
        d.eval_dataset or d.dataset,
        "evaluation",
        d.eval_problems,
        d.data_seed_eval,
        (d.eval_dataset_options or {}) if d.eval_dataset else options,
        d.eval_dataset_columns if d.eval_dataset else columns,
    )
    check_golds(test, d.eval_dataset or d.dataset)
    data.assert_disjoint(train, test)
    return train, test


def row_columns(row: data.Row) -> dict[str, Any]:
    return {"id": row.id, "answer": row.answer, "answer_type": row.answer_type, "source": row.source}


def rl_classes(recipe: Recipe) -> tuple[Any, Any, dict[str, Any]]:
    """The method's configuration, its trainer, and the keyword arguments that only this trainer has."""
    if recipe.method == "ppo":
        from rl_soft.train.ppo import SoftPPOConfig, SoftPPOTrainer

        names = ("gamma", "lam", "vf_coef", "value_clip", "value_learning_rate")
        return SoftPPOConfig, SoftPPOTrainer, {name: getattr(recipe.extra, name) for name in names}
    from trl import GRPOConfig

    from rl_soft.train.grpo import SoftGRPOTrainer

    return GRPOConfig, SoftGRPOTrainer, {}


def training_values(recipe: Recipe, **forced: Any) -> dict[str, Any]:
    """Keyword arguments of the trainer's configuration: our defaults, the recipe's keys, what must be so."""
    return {
        **trainer_defaults(recipe.method),
        **device_defaults(),
        **recipe.training,
        **forced,
        "output_dir": str(recipe.output_dir),
    }


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
    known = [KnownFailures()] if recipe.method in RL_METHODS else []  # a supervised loss is to bring the entropy down
    for added in (*known, interrupt, Checkpoints(trainer.args)):
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


def describe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, for --dry-run; its rewards can be made."""
    import yaml

    if recipe.method in RL_METHODS:
        reward_functions(recipe.extra.rewards)
    return yaml.safe_dump(recipe.resolved, sort_keys=False, allow_unicode=True)
