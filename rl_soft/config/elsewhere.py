"""Names of keys that other packages have for what a recipe here calls otherwise, does by itself, or cannot have.

The names are those of TRL's scripts and earlier versions, of open-r1, of transformers and of PEFT. A test holds the
table to TRL's own classes: each of their fields is a key here or stands below, and no name below is a key.
"""

from __future__ import annotations

from collections.abc import Iterable

from rl_soft.keys import nearest

CALLED = {  # name elsewhere -> the key here
    "torch_dtype": "dtype",
    "precision": "dtype",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_id": "model_name_or_path",
    "lora_rank": "lora_r",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "modules_to_save": "lora_modules_to_save",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
    "dataset_name": "dataset",
    "dataset_id_or_path": "dataset",
    "train_dataset": "dataset",
    "train_file": "dataset",
    "max_train_samples": "train_size",
    "validation_file": "eval_dataset",
    "max_eval_samples": "eval_problems",
    "reward_funcs": "rewards",
    "reward_functions": "rewards",
    "max_new_tokens": "max_answer_tokens",
    "epsilon_low": "epsilon",
    "kl_coef": "beta",
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "num_train_steps": "max_steps",
    "group_size": "num_generations",
}
BECOMES = {  # name elsewhere -> what to write here
    "dataset_config": "write dataset_options: {config: NAME}",
    "dataset_configs": "write dataset_options: {config: NAME}; one of them",
    "dataset_train_split": "a recipe takes the split train of a hub set; write another one into a .jsonl file",
    "dataset_test_split": "a recipe takes the split test of a hub set; write another one into a file for eval_dataset",
    "dataset_prompt_column": "write dataset_columns: {question: NAME}",
    "dataset_mixer": "one data set is trained on; write the rows into one .jsonl file",
    "datasets": "one data set is trained on; write the rows into one .jsonl file",
    "model_revision": "fetch it (hf download ID --revision REVISION --local-dir DIR) and set model_name_or_path: DIR",
    "bnb_4bit_quant_storage": "weights of 4 bits are stored in bytes, and not divided over processes; remove it",
    "quantization_config": "write load_in_4bit: true (and bnb_4bit_quant_type, use_bnb_nested_quant)",
    "lora_task_type": "it is CAUSAL_LM here; remove it",
    "max_prompt_length": "prompts are never cut; rows that do not fit the model are told before training; remove it",
    "max_seq_length": "write max_row_tokens (codi, sft, icot, coconut); RL has num_thoughts and max_answer_tokens",
    "use_liger_loss": "the exact density runs through this package's own chunked head; remove it",
    "chat_template": "it is that of the tokenizer in the model's folder; question_template changes the user's text",
    "warmup_ratio": "write warmup_steps; a number below 1 is a share of all steps",
    "overwrite_output_dir": "a run is never overwritten; the same command resumes, another output_dir starts anew",
    "wandb_project": "set the environment variable WANDB_PROJECT, and report_to: wandb",
    "wandb_entity": "set the environment variable WANDB_ENTITY, and report_to: wandb",
    "wandb_run_group": "set the environment variable WANDB_RUN_GROUP, and report_to: wandb",
    "reward_model_name_or_path": "rewards are functions; write one that asks the model (docs/own_rewards.md)",
    "benchmarks": "use rl-soft eval MODEL --dataset NAME after the run",
    "hub_model_revision": "push from the finished folder: hf upload ID runs/x/model --revision NAME",
    "deepspeed_config": "use ./launch.sh RECIPE --zero 0|1|2|3",
    "gpus": "use ./launch.sh RECIPE --nproc N",
    "num_processes": "use ./launch.sh RECIPE --nproc N",
    "zero": "it belongs to ./launch.sh RECIPE --zero 0|1|2|3",
    "nproc": "it belongs to ./launch.sh RECIPE --nproc N",
    "gamma_dirichlet": "write thought_gamma",
    "tau": "write thought_tau",
    "num_latent_tokens": "write num_thoughts",
    "num_latent": "write num_thoughts",
    "max_thoughts": "write num_thoughts",
}
ABSENT = {  # name elsewhere -> why there is nothing like it here
    "load_in_8bit": "8-bit products round the states, too, in a rollout otherwise than in the training pass; "
    "use load_in_4bit",
    "lora_target_parameters": "a recipe's adapter is in whole layers; in Python SoftGRPOTrainer takes any peft_config",
    "lora_bias": "a recipe's adapter is in whole layers; in Python SoftGRPOTrainer takes any peft_config",
    "dataset_streaming": "rows are checked before training, so all of them are read",
    "streaming": "rows are checked before training, so all of them are read",
    "test_split_size": "name a second file in eval_dataset; training and evaluation never overlap",
    "ignore_bias_buffers": "it is not needed here; remove it",
    "use_unsloth": "models are plain transformers models",
    "tools": "soft rollouts have a single turn",
    "callbacks": "in Python SoftGRPOTrainer takes callbacks",
}


def hint_for(name: str, known: Iterable[str], prefix: str = "") -> str:
    """How a message about an unknown key ends: what it is called here, why it is not here, or the nearest key.

    Args:
        known: the keys of the recipe's method, or of a command.
        prefix: of a key in the message.
    """
    known = set(known)
    if CALLED.get(name) in known:
        return f": it is called {prefix}{CALLED[name]} here"
    if name in BECOMES or name in ABSENT:
        return f": {BECOMES.get(name) or ABSENT[name]}"
    return nearest(name, known, prefix)
