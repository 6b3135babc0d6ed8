"""Names of keys that other packages have for what a recipe here calls otherwise, does by itself, or cannot have.

The names are those of TRL's scripts and earlier versions, of open-r1, of transformers and of PEFT. `theirs` reads a
recipe with them. A test holds the tables to TRL's own classes: each of their fields is a key here or stands below, and
no name below is a key.
"""

from __future__ import annotations

from collections.abc import Iterable

from rl_soft.keys import nearest

CALLED = {  # name elsewhere -> the key here, which it is read as
    "torch_dtype": "dtype",
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
    "epsilon_low": "epsilon",
    "kl_coef": "beta",
    "hub_model_revision": "hub_revision",
    "lr": "learning_rate",
    "num_train_steps": "max_steps",
    "group_size": "num_generations",
}
READ = {  # name elsewhere -> what `theirs` makes of it
    "dataset_config": "dataset_options: {config: NAME}",
    "dataset_train_split": "dataset_options: {train_split: NAME}",
    "dataset_test_split": "dataset_options: {evaluation_split: NAME}",
    "dataset_prompt_column": "dataset_columns: {question: NAME}",
    "warmup_ratio": "warmup_steps; a number below 1 is a share of all steps",
    "num_processes": "./launch.sh RECIPE --nproc N",
    # parameters of open-r1's rewards
    "cosine_min_value_wrong": "CosineScaled: {min_value_wrong: NUMBER}",
    "cosine_max_value_wrong": "CosineScaled: {max_value_wrong: NUMBER}",
    "cosine_min_value_correct": "CosineScaled: {min_value_correct: NUMBER}",
    "cosine_max_value_correct": "CosineScaled: {max_value_correct: NUMBER}",
    "cosine_max_len": "CosineScaled: {max_length: NUMBER}",
    "repetition_n_grams": "Repetition: {ngram_size: NUMBER}",
    "repetition_max_penalty": "Repetition: {max_penalty: NUMBER}",
    "code_language": "CodeFormat: {language: NAME}",
    "max_completion_len": "Overlong: {max_length: NUMBER}",
    "soft_punish_cache": "Overlong: {buffer: NUMBER}",
}
IGNORED = {  # name elsewhere -> why a recipe may hold it and nothing follows from it
    "max_prompt_length": "prompts are never cut; rows that do not fit the model are told before training",
    "use_liger_loss": "the density runs through this package's own chunked head",
    "overwrite_output_dir": "a run is never overwritten; the same command resumes, another output_dir starts anew",
    "lora_task_type": "it is CAUSAL_LM",
    "ignore_bias_buffers": "it is not needed",
    "benchmarks": "rl-soft eval MODEL --dataset NAME measures after the run",
    "callbacks": "a recipe has none; in Python SoftGRPOTrainer takes callbacks",
    "overwrite_hub_revision": "push_to_hub and hub_revision decide what is sent",
    "push_to_hub_revision": "push_to_hub and hub_revision decide what is sent",
    "wandb_log_unique_prompts": "completions/*.parquet has the prompts (log_completions)",
    "code_eval_test_batch_size": "it belongs to rewards that run programs elsewhere",
    "code_eval_scoring_mode": "it belongs to rewards that run programs elsewhere",
    "parallel_code_exec_per_proc": "it belongs to rewards that run programs elsewhere",
    "code_provider": "it belongs to rewards that run programs elsewhere",
    "ioi_provider": "it belongs to rewards that run programs elsewhere",
    "e2b_router_url": "it belongs to rewards that run programs elsewhere",
    "morph_router_url": "it belongs to rewards that run programs elsewhere",
    "vllm_device": "vLLM shares the GPUs of training; TRL has dropped the key",
    "vllm_dtype": "vLLM has the dtype of training; TRL has dropped the key",
    "vllm_max_model_len": "it follows from the prompts and the lengths; TRL has dropped the key",
}
BECOMES = {  # name elsewhere -> what to write here
    "precision": "write dtype: bfloat16, float32 or float16",
    "max_new_tokens": "write max_completion_length (thoughts and answer), or num_thoughts and max_answer_tokens",
    "batch_size": "write per_device_train_batch_size and prompts_per_step",
    "dataset_configs": "write dataset_options: {config: NAME}; one of them",
    "dataset_mixer": "one data set is trained on; write the rows into one .jsonl file",
    "datasets": "one data set is trained on; write the rows into one .jsonl file",
    "bnb_4bit_quant_storage": "weights of 4 bits are stored in bytes, and not divided over processes; remove it",
    "quantization_config": "write load_in_4bit: true (and bnb_4bit_quant_type, use_bnb_nested_quant)",
    "max_seq_length": "write max_row_tokens (codi, sft, icot, coconut); RL has num_thoughts and max_answer_tokens",
    "reward_model_name_or_path": "rewards are functions; write one that asks the model (docs/own_rewards.md)",
    "deepspeed_config": "use ./launch.sh RECIPE --zero 0|1|2|3",
    "gpus": "use ./launch.sh RECIPE --nproc N",
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
    "use_unsloth": "models are plain transformers models",
    "tools": "soft rollouts have a single turn",
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
    if name in READ:
        return f": write {READ[name]}"
    if name in BECOMES or name in ABSENT:
        return f": {BECOMES.get(name) or ABSENT[name]}"
    return nearest(name, known, prefix)
