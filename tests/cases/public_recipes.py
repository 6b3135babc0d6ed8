"""Keys and values of public GRPO recipes: what stands in them, without their texts (prompts and templates are ours).

Sources, both Apache-2.0: github.com/huggingface/open-r1 at 1416fa0, github.com/huggingface/trl at f2cd577.
"""

TAGS = "Think first. Answer so:\n<think>\n...\n</think>\n<answer>\n...\n</answer>"
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "
OPEN_R1 = {  # what its five recipes have in common
    "model_revision": "main", "torch_dtype": "bfloat16", "attn_implementation": "flash_attention_2",
    "system_prompt": TAGS, "bf16": True, "use_vllm": True, "do_eval": False, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "hub_strategy": "every_save", "log_completions": True,
    "log_level": "info", "logging_first_step": True, "logging_steps": 1, "logging_strategy": "steps",
    "overwrite_output_dir": True, "push_to_hub": True, "report_to": ["wandb"], "save_total_limit": 1, "seed": 42,
}  # fmt: skip
MATH = {
    **OPEN_R1, "dataset_name": "open-r1/OpenR1-Math-220k", "dataset_prompt_column": "problem",
    "gradient_accumulation_steps": 4, "max_prompt_length": 512, "max_steps": -1, "num_generations": 16,
    "num_train_epochs": 1, "per_device_eval_batch_size": 16, "per_device_train_batch_size": 16,
    "reward_funcs": ["accuracy", "format", "tag_count"], "reward_weights": [1.0, 1.0, 1.0], "save_strategy": "epoch",
    "warmup_ratio": 0.1,
}  # fmt: skip
CODE = {
    **OPEN_R1, "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "beta": 0.01, "gradient_accumulation_steps": 4,
    "hub_model_id": "Qwen2.5-1.5B-Open-R1-Code-GRPO", "learning_rate": 5.0e-6,
    "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "max_prompt_length": 1024,
    "max_completion_length": 2048, "max_steps": 500, "num_generations": 14, "num_train_epochs": 1,
    "output_dir": "data/Qwen2.5-1.5B-Open-R1-Code-GRPO", "per_device_train_batch_size": 16, "save_strategy": "steps",
    "save_steps": 50, "temperature": 1.0, "warmup_ratio": 0.03,
}  # fmt: skip

RECIPES = {  # repository: path -> keys
    "open-r1: recipes/DeepSeek-R1-Distill-Qwen-1.5B/grpo/config_demo.yaml": {
        **MATH, "model_name_or_path": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "chat_template": TEMPLATE,
        "hub_model_id": "DeepSeek-R1-Distill-Qwen-1.5B-GRPO", "learning_rate": 1.0e-6,
        "lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "max_completion_length": 2048, "output_dir": "data/DeepSeek-R1-Distill-Qwen-1.5B-GRPO", "temperature": 0.7,
        "use_liger_kernel": True,
    },
    "open-r1: recipes/Qwen2.5-1.5B-Instruct/grpo/config_demo.yaml": {
        **MATH, "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct", "hub_model_id": "Qwen2.5-1.5B-Open-R1-GRPO",
        "learning_rate": 2.0e-5, "lr_scheduler_type": "cosine", "max_completion_length": 1024,
        "output_dir": "data/Qwen2.5-1.5B-Open-R1-GRPO",
    },
    "open-r1: recipes/Qwen2.5-1.5B-Instruct/grpo/config_demo_code.yaml": {
        **CODE, "dataset_name": "open-r1/verifiable-coding-problems-python",
        "dataset_prompt_column": "problem_statement", "reward_funcs": ["code", "format"], "reward_weights": [1.0, 0.1],
    },
    "open-r1: recipes/Qwen2.5-1.5B-Instruct/grpo/config_demo_code_ioi.yaml": {
        **CODE, "dataset_name": "open-r1/ioi", "dataset_prompt_column": "problem", "code_language": "cpp",
        "reward_funcs": ["ioi_code", "code_format", "format"], "reward_weights": [1.0, 0.1, 0.1],
        "code_eval_test_batch_size": 3,
    },
    "open-r1: recipes/Qwen2.5-Coder-7B-Instruct/grpo/config_codeforces.yaml": {
        **OPEN_R1, "model_name_or_path": "Qwen/Qwen2.5-Coder-7B-Instruct", "dataset_name": "open-r1/codeforces",
        "dataset_prompt_column": "prompt", "dataset_config": "verifiable-prompts", "dataset_test_split": "test",
        "dataset_train_split": "train", "callbacks": ["push_to_hub_revision"], "benchmarks": ["lcb_v4"], "beta": 0.0,
        "loss_type": "dr_grpo", "scale_rewards": False, "eval_strategy": "no", "vllm_device": "auto",
        "vllm_gpu_memory_utilization": 0.7, "gradient_accumulation_steps": 32,
        "hub_model_id": "open-r1/Qwen2.5-Coder-7B-Instruct-Codeforces-GRPO", "hub_model_revision": "v01.00",
        "learning_rate": 1.0e-6, "lr_scheduler_type": "constant_with_warmup", "max_grad_norm": 0.2,
        "max_prompt_length": 2000, "max_completion_length": 8192, "max_steps": -1, "num_generations": 16,
        "num_train_epochs": 4, "output_dir": "data/Qwen2.5-Coder-7B-Instruct-Codeforces-GRPO_v01.00",
        "per_device_train_batch_size": 4, "reward_funcs": ["cf_code", "code_format"], "reward_weights": [1.0, 0.1],
        "save_strategy": "steps", "save_steps": 0.05, "temperature": 0.7, "wandb_entity": "huggingface",
        "wandb_project": "open-r1", "warmup_ratio": 0.1, "mask_truncated_completions": True,
        "code_eval_test_batch_size": -1, "code_eval_scoring_mode": "weighted_sum",
    },
    "trl: docs/source/clis.md": {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B", "dataset_name": "HuggingFaceH4/Polaris-Dataset-53K",
        "reward_funcs": ["accuracy_reward"], "num_processes": 4,
    },
    "trl: docs/source/lora_without_regret.md": {
        "model_name_or_path": "Qwen/Qwen3-0.6B", "dataset_name": "HuggingFaceH4/OpenR1-Math-220k-default-verified",
        "output_dir": "grpo-full-qwen3-0.6b", "learning_rate": 1.0e-6, "lr_scheduler_type": "cosine",
        "warmup_steps": 0.0, "max_grad_norm": 1.0, "beta": 0.0, "max_completion_length": 4096, "num_generations": 16,
        "generation_batch_size": 16, "gradient_accumulation_steps": 8, "per_device_train_batch_size": 1,
        "num_train_epochs": 1, "lora_r": 1, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": "all-linear",
        "vllm_mode": "colocate", "save_strategy": "steps", "save_steps": 50, "save_total_limit": 1, "logging_steps": 1,
        "max_steps": 200, "report_to": "trackio", "reward_funcs": ["reasoning_accuracy_reward"],
    },
    "trl: docs/source/quickstart.md": {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "dataset_name": "trl-lib/DeepMath-103K",
        "reward_funcs": "trl.rewards.accuracy_reward", "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 8, "num_generations": 4, "max_completion_length": 512,
    },
    "trl: docs/source/paper_index.md (Lite PPO; model and data of quickstart.md)": {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B-Instruct", "dataset_name": "trl-lib/DeepMath-103K",
        "reward_funcs": ["accuracy_reward"], "scale_rewards": "batch", "loss_type": "dapo", "beta": 0.0,
        "top_p": 0.99, "top_k": 100, "temperature": 0.99, "num_generations": 8, "num_iterations": 1,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 32, "steps_per_generation": 8,
    },
    "trl: examples/scripts/gspo.py": {
        "model_name_or_path": "Qwen/Qwen3-0.6B", "output_dir": "gspo-Qwen3-0.6B", "learning_rate": 1e-5,
        "dtype": "bfloat16", "max_completion_length": 1024, "use_peft": True,
        "lora_target_modules": ["q_proj", "v_proj"], "log_completions": True, "per_device_train_batch_size": 8,
        "num_generations": 8, "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4,
        "beta": 0.0, "loss_type": "grpo", "gradient_accumulation_steps": 2, "steps_per_generation": 8,
        "dataset_name": "AI-MO/NuminaMath-TIR", "dataset_train_split": "train[:5%]",
        "dataset_test_split": "test[:5%]", "dataset_prompt_column": "problem", "system_prompt": TAGS,
        "reward_funcs": ["think_format_reward", "accuracy_reward"],
    },
}  # fmt: skip

# What is left out of each, and nothing else.
LEFT_OUT = {
    "open-r1: recipes/Qwen2.5-1.5B-Instruct/grpo/config_demo_code.yaml": {"reward_funcs: code"},
    "open-r1: recipes/Qwen2.5-1.5B-Instruct/grpo/config_demo_code_ioi.yaml": {"reward_funcs: ioi_code"},
    "open-r1: recipes/Qwen2.5-Coder-7B-Instruct/grpo/config_codeforces.yaml": {"reward_funcs: cf_code"},
}
