"""Every recipe field, its help text and its validation. A recipe is flat YAML; its keys are the fields below.

An unknown key is an error that names the nearest valid one. The command line beats the file. Keys of the trainers'
own configurations (transformers' TrainingArguments, TRL's GRPOConfig) are valid too.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rl_soft.layout import Thinking

METHODS = ("codi", "sft", "icot", "coconut", "grpo", "ppo")
RL_METHODS = ("grpo", "ppo")
KD_LOSSES, KD_POSITIONS = ("l1", "smooth_l1"), ("first", "answer")
RATIOS = ("joint", "factored", "top1", "conditional", "pathwise")
TRACKERS = ("tensorboard", "trackio", "wandb")
DTYPES = ("float32", "bfloat16", "float16")
CONTROLS = ("none", "zero", "shuffle", "repeat")  # of `policy.disturb`


@dataclass
class ModelArguments:
    """Which weights a run starts from: warm_start, model_name_or_path, or random weights from model_config."""

    warm_start: str | None = field(
        default=None, metadata={"help": "A recipe whose result this run starts from; trained first if missing."}
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Model folder or hub id."})
    model_config: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "transformers config of a model with random weights: {model_type: llama, ...}."},
    )
    vocabulary: str | None = field(
        default=None, metadata={"help": "The characters of the character tokenizer that goes with model_config."}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, or float64 (small models)."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha; the update is scaled by alpha / r."})
    lora_target_modules: str | list[str] = field(
        default="all-linear", metadata={"help": "Modules that get an adapter: names, or all-linear."}
    )


@dataclass
class DataArguments:
    """Training and evaluation problems (see docs/data.md)."""

    dataset: str = field(default="", metadata={"help": "Generator name, known data set, local file, or hub id."})
    dataset_options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the source."})
    dataset_columns: dict[str, str] | None = field(
        default=None, metadata={"help": "Names of a file's columns: {question: ..., answer: ..., steps: ...}."}
    )
    train_size: int | None = field(default=None, metadata={"help": "Number of training problems; all if absent."})
    data_seed_train: int = field(default=1, metadata={"help": "Seed of generated training problems."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Evaluation source; dataset if absent."})
    eval_dataset_options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of eval_dataset."})
    eval_problems: int = field(default=256, metadata={"help": "Number of held-out problems; 0 skips the evaluation."})
    data_seed_eval: int = field(default=2, metadata={"help": "Seed of generated evaluation problems."})


@dataclass
class EvalArguments:
    """Pass@k before and after a run."""

    eval_samples: int = field(
        default=32, metadata={"help": "n, sampled completions a problem; a greedy one is added."}
    )
    eval_k: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "The k of Pass@k."})
    eval_batch_size: int = field(default=512, metadata={"help": "Completions decoded together on a process."})
    eval_seed: int = field(default=7, metadata={"help": "Seed of the evaluation's noise; the same before and after."})


@dataclass
class EvaluationArguments:
    """`rl-soft eval MODEL`: these and the fields of `Thinking`; a recipe's keys mean the same here."""

    model_name_or_path: str = field(default="", metadata={"help": "Model folder, PEFT folder or hub id."})
    output_dir: str = field(default="", metadata={"help": "Directory of the records and the report."})
    dataset: str = field(default="", metadata={"help": "Generator name, known data set, local file, or hub id."})
    dataset_options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the source."})
    dataset_columns: dict[str, str] | None = field(default=None, metadata={"help": "Names of a file's columns."})
    split: str = field(default="evaluation", metadata={"help": "evaluation, train, or a split of the hub's."})
    eval_problems: int | None = field(default=None, metadata={"help": "Number of problems; all if absent."})
    data_seed_eval: int = field(default=2, metadata={"help": "Seed of generated problems or of the draw."})
    eval_samples: int = field(
        default=32, metadata={"help": "n, sampled completions a problem; a greedy one is added."}
    )
    eval_k: list[int] | None = field(default=None, metadata={"help": "The k of Pass@k; powers of two if absent."})
    eval_batch_size: int = field(default=64, metadata={"help": "Completions decoded together on a process."})
    eval_seed: int = field(default=7, metadata={"help": "Seed of the noise."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, or float64 (small models)."}
    )
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "Run the programs that the model writes (humaneval, mbpp)."}
    )
    control: str = field(
        default="none", metadata={"help": "What is done to the thoughts that are fed: none, zero, shuffle or repeat."}
    )

    def __post_init__(self) -> None:
        if self.control not in CONTROLS:
            raise ValueError(f"control must be one of {', '.join(CONTROLS)}, got {self.control!r}")
        for name in ("model_name_or_path", "output_dir", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: rl-soft eval MODEL --dataset NAME --output_dir DIR")
        for name in ("eval_samples", "eval_batch_size", "eval_problems"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_k and not 1 <= min(self.eval_k) <= max(self.eval_k) <= self.eval_samples:
            raise ValueError(f"eval_k must be between 1 and eval_samples ({self.eval_samples}), got {self.eval_k}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass
class AnalysisArguments:
    """`rl-soft analyze probe MODEL` and `rl-soft analyze cost MODEL --against COT_MODEL`."""

    model_name_or_path: str = field(default="", metadata={"help": "Model folder of ours."})
    against: str | None = field(default=None, metadata={"help": "cost: the model that writes its reasoning."})
    output_dir: str | None = field(default=None, metadata={"help": "Where the figures are also written."})
    dataset: str = field(default="", metadata={"help": "Generator name, known data set, local file, or hub id."})
    dataset_options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the source."})
    dataset_columns: dict[str, str] | None = field(default=None, metadata={"help": "Names of a file's columns."})
    split: str = field(default="evaluation", metadata={"help": "evaluation, train, or a split of the hub's."})
    eval_problems: int | None = field(default=None, metadata={"help": "Number of problems; all if absent."})
    data_seed_eval: int = field(default=2, metadata={"help": "Seed of generated problems or of the draw."})
    eval_batch_size: int = field(default=64, metadata={"help": "probe: problems decoded together."})
    top_k: int = field(default=5, metadata={"help": "probe: tokens of a thought that are looked at."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32 or bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2."})

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset is missing: rl-soft analyze KIND MODEL --dataset NAME")
        for name in ("eval_problems", "eval_batch_size", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


@dataclass
class SupervisedArguments:
    """What the methods that learn from worked solutions share."""

    max_row_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Rows longer than this, with steps and thoughts, are left out and counted; without it a row "
            "longer than the model is an error."
        },
    )
    stop_at_accuracy: float | None = field(
        default=None, metadata={"help": "Stop once sampled validation accuracy reaches this; None trains max_steps."}
    )
    validation_problems: int = field(default=256, metadata={"help": "Training-side problems held out for validation."})
    validation_every: int = field(default=50, metadata={"help": "Steps between validations."})

    def __post_init__(self) -> None:
        for name in ("max_row_tokens", "validation_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass
class CodiArguments(SupervisedArguments):
    """L = alpha L_student + beta L_KD + gamma L_teacher (CODI, arXiv 2502.21074, Eq. 5)."""

    alpha: float = field(default=1.0, metadata={"help": "Weight of the student's cross-entropy on the answer."})
    beta: float = field(default=1.0, metadata={"help": "Weight of the distillation loss on the hidden states."})
    gamma: float = field(default=1.0, metadata={"help": "Weight of the teacher's cross-entropy on steps and answer."})
    kd_loss: str = field(default="l1", metadata={"help": "Distance of the hidden states: l1 or smooth_l1."})
    kd_as_released: bool = field(
        default=False,
        metadata={"help": "Divide the distance by the teacher's std, as the released code does, and not the states."},
    )
    kd_layers: list[int] | None = field(
        default=None, metadata={"help": "Distilled layers, 0 for the embeddings; all but the embeddings if absent."}
    )
    kd_position: str = field(
        default="first",
        metadata={"help": "Distilled positions: first, what predicts the first answer token, or answer, all of them."},
    )
    teacher: str = field(
        default="self",
        metadata={"help": "self, or a folder or recipe of a model that is the frozen teacher (then gamma is unused)."},
    )
    use_projector: bool = field(
        default=True, metadata={"help": "thought hidden: feed the state through the projector, or as it is."}
    )
    projector_size: int | None = field(
        default=None, metadata={"help": "Width between the projector's layers; the model's if absent."}
    )
    drop_last_step: bool = field(default=False, metadata={"help": "Leave the teacher's last step out."})
    train_noise: bool = field(
        default=True, metadata={"help": "Draw Gumbel noise on the student's thoughts (gumbel and hybrid)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("kd_loss", KD_LOSSES), ("kd_position", KD_POSITIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in ("alpha", "beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.kd_layers is not None and (not self.kd_layers or not all(type(i) is int for i in self.kd_layers)):
            raise ValueError(f"kd_layers must be a list of layer numbers, for example [1, 2], got {self.kd_layers}")
        if self.projector_size is not None and self.projector_size < 1:
            raise ValueError(f"projector_size must be at least 1, got {self.projector_size}")
        if self.teacher != "self" and not self.beta:
            raise ValueError(f"teacher {self.teacher}: with beta 0 nothing is distilled from it; use teacher self")


@dataclass
class SFTArguments(SupervisedArguments):
    """Supervised fine-tuning on worked solutions (CoT), or on answers alone (No-CoT)."""

    worked_steps: bool = field(default=True, metadata={"help": "Train on the steps (CoT); false: No-CoT."})


@dataclass
class ICoTArguments(SupervisedArguments):
    """The removal schedule of iCoT (arXiv 2405.14838)."""

    cot_epochs: float = field(default=0.0, metadata={"help": "Epochs with the whole chain before removal begins."})
    remove_per_epoch: float = field(default=8.0, metadata={"help": "Tokens removed from the left in an epoch."})
    remove_all_beyond: int | None = field(
        default=None, metadata={"help": "Remove the whole chain once this many tokens are removed."}
    )
    removal_smoothing: float | None = field(
        default=4.0,
        metadata={"help": "lambda: o tokens more are removed with P(o) ~ exp(-lambda o); null: none more."},
    )
    reset_optimizer: bool = field(default=True, metadata={"help": "A fresh optimizer state at each removal."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cot_epochs < 0:
            raise ValueError(f"cot_epochs must be at least 0, got {self.cot_epochs}")
        for name in ("remove_per_epoch", "removal_smoothing", "remove_all_beyond"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass
class CoconutArguments(SupervisedArguments):
    """The curriculum of Coconut (arXiv 2412.06769)."""

    thoughts_per_step: int = field(default=2, metadata={"help": "c, the thoughts that replace a step of text."})
    cot_epochs: float = field(default=0.0, metadata={"help": "Epochs of stage 0: every step is text."})
    epochs_per_stage: float = field(default=3.0, metadata={"help": "Epochs of each stage but the last."})
    uniform_prob: float = field(
        default=0.0, metadata={"help": "Share of rows trained at a random stage instead of the scheduled one."}
    )
    reset_optimizer: bool = field(default=True, metadata={"help": "A fresh optimizer state at each stage."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thoughts_per_step < 1:
            raise ValueError(f"thoughts_per_step must be at least 1, got {self.thoughts_per_step}")
        if self.cot_epochs < 0:
            raise ValueError(f"cot_epochs must be at least 0, got {self.cot_epochs}")
        if self.epochs_per_stage <= 0:
            raise ValueError(f"epochs_per_stage must be above 0, got {self.epochs_per_stage}")
        if not 0 <= self.uniform_prob <= 1:
            raise ValueError(f"uniform_prob must be between 0 and 1, got {self.uniform_prob}")


@dataclass
class RLArguments:
    """What our trainers add to TRL's GRPOConfig."""

    prompts_per_step: int = field(default=32, metadata={"help": "Prompts of one rollout, over all processes."})
    updates_per_rollout: int = field(
        default=1, metadata={"help": "Optimizer steps that split one rollout (mini-batches); times num_iterations."}
    )
    rewards: list[Any] = field(
        default_factory=lambda: ["math_accuracy"],
        metadata={"help": "Reward functions: names, dotted paths, or {Name: {parameter: value}}."},
    )
    ratio: str = field(
        default="joint",
        metadata={"help": "Policy ratio of a thought: joint, factored, top1, conditional, pathwise (docs/grpo.md)."},
    )
    rest_weight: float = field(
        default=1.0, metadata={"help": "ratio factored: weight of log p(rest | strongest id) in the loss."}
    )
    thought_epsilon: float | None = field(
        default=None, metadata={"help": "Clip range of thoughts, both ways; that of answer tokens if absent."}
    )
    chunk_size: int | None = field(
        default=None, metadata={"help": "Positions whose (chunk, V) logits are alive at once; by memory if absent."}
    )

    def __post_init__(self) -> None:
        if self.ratio not in RATIOS:
            raise ValueError(f"ratio must be one of {', '.join(RATIOS)}, got {self.ratio!r}")
        if self.rest_weight < 0:
            raise ValueError(f"rest_weight must be at least 0, got {self.rest_weight}")
        if self.thought_epsilon is not None and self.thought_epsilon <= 0:
            raise ValueError(f"thought_epsilon must be above 0, got {self.thought_epsilon}")


@dataclass
class PPOArguments(RLArguments):
    """The value head and its advantages (docs/ppo.md)."""

    gamma: float = field(default=1.0, metadata={"help": "Discount from one action to the next."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss, which reaches the trunk."})
    value_clip: float | None = field(
        default=0.2, metadata={"help": "Clip range of a value around the rollout's; null does not clip."}
    )
    value_learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of the value head."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio == "pathwise":
            raise ValueError(
                "ratio pathwise: thoughts are then not actions and have no values; use joint, factored or top1, "
                "or method grpo"
            )
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("vf_coef", "value_learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"value_clip must be above 0, or null for no clipping, got {self.value_clip}")


GROUPS: dict[str, tuple[type, ...]] = {
    "codi": (Thinking, ModelArguments, DataArguments, EvalArguments, CodiArguments),
    "sft": (Thinking, ModelArguments, DataArguments, EvalArguments, SFTArguments),
    "icot": (Thinking, ModelArguments, DataArguments, EvalArguments, ICoTArguments),
    "coconut": (Thinking, ModelArguments, DataArguments, EvalArguments, CoconutArguments),
    "grpo": (Thinking, ModelArguments, DataArguments, EvalArguments, RLArguments),
    "ppo": (Thinking, ModelArguments, DataArguments, EvalArguments, PPOArguments),
}
# The one way of thinking that a method trains: phase, thought.
TRAINED_THINKING = {
    "sft": ("explicit", "token"),
    "icot": ("explicit", "token"),
    "coconut": ("latent", "hidden"),
}
# Set by us from other fields; a recipe that names one of these would contradict itself.
DERIVED = {
    "generation_batch_size": "prompts_per_step",
    "steps_per_generation": "prompts_per_step and updates_per_rollout",
    "gradient_accumulation_steps": "prompts_per_step and updates_per_rollout",
    "max_completion_length": "num_thoughts and max_answer_tokens",
}
DERIVED_SFT = {
    "max_length": "max_row_tokens",
    "packing": "nothing: a row is a sequence",
    "padding_free": "nothing: a row is a sequence",
    "completion_only_loss": "the rows: the loss is on what follows the question",
    "dataset_kwargs": "the rows, which the layout makes",
}
REFUSED = {
    "use_vllm": "vLLM takes embeddings for prompts only, so soft thoughts cannot be decoded by it",
    "use_liger_kernel": "the exact density runs through this package's own chunked head",
    "use_transformers_continuous_batching": "continuous batching takes token ids only",
    "rollout_func": "the soft rollout is this package's own",
    "environment_factory": "soft rollouts have a single turn",
    "auto_find_batch_size": "a rollout must hold whole groups; lower per_device_train_batch_size instead",
}


GROUP_ONLY = {  # what only a method with groups can read
    "scale_rewards": "PPO has no groups; it whitens advantages over the rollout",
    "multi_objective_aggregation": "PPO has no groups; it takes the weighted sum of the rewards",
}


class _Loader(yaml.SafeLoader):
    """YAML with 1e-4 read as a number (YAML 1.1 asks for a dot) and duplicate keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise ValueError(f"key {key_node.value!r} appears twice (line {key_node.start_mark.line + 1})")
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Recipe:
    """A validated recipe. `training` holds the keys of the trainer's own configuration, built late by the method."""

    path: Path
    method: str
    thinking: Thinking
    model: ModelArguments
    data: DataArguments
    eval: EvalArguments
    extra: Any  # the last class of the method's GROUPS
    training: dict[str, Any]
    values: dict[str, Any]  # flat, as resolved: what config.yaml stores

    @property
    def output_dir(self) -> Path:
        return Path(self.values["output_dir"])

    @property
    def seed(self) -> int:
        return int(self.values.get("seed", 42))


def read_yaml(path: Path) -> dict[str, Any]:
    """A recipe's keys. Raises ValueError naming the file when it is missing or not a mapping."""
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ValueError(f"recipe {path} does not exist{hint}")
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"recipe {path} must hold `key: value` lines")
    values.pop("_", None)  # the line that makes a recipe a Python program too
    return values


def parse_overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value` or `--key=value` pairs; values are read as YAML."""
    values: dict[str, Any] = {}
    i = 0
    while i < len(arguments):
        word = arguments[i]
        if not word.startswith("--"):
            raise ValueError(f"expected --key value, got {word!r}")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if i + 1 == len(arguments) or (arguments[i + 1].startswith("--") and len(arguments[i + 1]) > 2):
                text = "true"  # a bare flag
            else:
                i += 1
                text = arguments[i]
        values[key.replace("-", "_")] = _read_value(text)
        i += 1
    return values


def _read_value(text: str) -> Any:
    """A value as YAML; what YAML cannot read or takes for a comment (`=`, `####`) is the text that it is."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text
    return text if value is None and text.startswith("#") else value


def trainer_class(method: str) -> type:
    """The configuration dataclass of the host trainer (imported late: it is slow)."""
    if method == "sft":
        from trl import SFTConfig

        return SFTConfig
    if method not in RL_METHODS:
        from transformers import TrainingArguments

        return TrainingArguments
    from trl import GRPOConfig

    return GRPOConfig


def _check_type(f: dataclasses.Field, value: Any) -> Any:
    """Refuse a value of the wrong kind for our own fields; int is accepted for float."""
    annotation = str(f.type)
    allowed: tuple[type, ...] = ()
    for name, kinds in {
        "int": (int,), "float": (float, int), "str": (str,), "bool": (bool,), "list": (list,), "dict": (dict,),
    }.items():  # fmt: skip
        if re.search(rf"\b{name}\b", annotation):
            allowed += kinds
    if value is None:
        if "None" in annotation:
            return value
    elif isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed):
        return float(value) if "float" in annotation and isinstance(value, int) else value
    raise ValueError(f"{f.name} must be {annotation}, got {value!r}")


def load_recipe(path: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """Read and validate a recipe.

    Raises:
        ValueError: an unknown key (with the nearest valid one), a value of the wrong type or out of range, a key that
            we derive from others, or a feature that soft rollouts cannot have.
    """
    path = Path(path)
    values = {**read_yaml(path), **(overrides or {})}
    method = values.get("method")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r} ({path})")
    groups = GROUPS[method]
    trainer_fields = {f.name for f in dataclasses.fields(trainer_class(method)) if f.init}
    own_fields = {f.name: f for group in groups for f in dataclasses.fields(group)}
    known = trainer_fields | own_fields.keys() | {"method"}
    for key, value in values.items():
        if key in REFUSED and value:
            raise ValueError(f"{key} is not available: {REFUSED[key]}")
        if key == "ds3_gather_for_generation" and value is False:
            raise ValueError(f"{key} must be true: rollouts end at different lengths on different processes")
        if method == "ppo" and key in GROUP_ONLY:
            raise ValueError(f"{key} is not available: {GROUP_ONLY[key]}")
        derived = DERIVED if method in RL_METHODS else DERIVED_SFT if method == "sft" else {}
        if key in derived:
            raise ValueError(f"{key} is derived from {derived[key]}; remove it from {path}")
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown key {key!r} in {path}{hint}")
    parts = []
    for group in groups:
        names = {f.name for f in dataclasses.fields(group)}
        parts.append(group(**{k: _check_type(own_fields[k], v) for k, v in values.items() if k in names}))
    thinking, model, data, evaluation, extra = parts
    if not values.get("output_dir"):
        raise ValueError(f"output_dir is missing in {path}")
    values.setdefault("seed", 42)  # resolved, so that a warm start is found whether or not its recipe names the seed
    values["output_dir"] = str(values["output_dir"]).replace("{seed}", str(values["seed"]))
    if not data.dataset:
        raise ValueError(f"dataset is missing in {path}")
    sources = [k for k in ("warm_start", "model_name_or_path", "model_config") if getattr(model, k)]
    if len(sources) != 1:
        raise ValueError(
            f"{path} must name one of warm_start, model_name_or_path and model_config, not "
            f"{' and '.join(sources) or 'none of them'}"
        )
    if model.model_config and not model.vocabulary:
        raise ValueError(f"vocabulary is missing in {path}: model_config makes a model for a character tokenizer")
    if evaluation.eval_k and max(evaluation.eval_k) > evaluation.eval_samples:
        raise ValueError(f"eval_k must be at most eval_samples ({evaluation.eval_samples}), got {evaluation.eval_k}")
    check_thought(method, thinking, extra)
    if method in TRAINED_THINKING and (thinking.phase, thinking.thought) != TRAINED_THINKING[method]:
        phase, thought = TRAINED_THINKING[method]
        raise ValueError(
            f"method {method} trains phase {phase} with thought {thought}, got phase {thinking.phase} with thought "
            f"{thinking.thought} ({path})"
        )
    if method == "coconut" and (thinking.num_thoughts < 1 or thinking.num_thoughts % extra.thoughts_per_step):
        raise ValueError(
            f"num_thoughts must be a multiple of thoughts_per_step ({extra.thoughts_per_step}), one for each step "
            f"that thoughts replace, got {thinking.num_thoughts}"
        )
    check_trackers(values.get("report_to"))
    training = {k: v for k, v in values.items() if k in trainer_fields and k != "temperature"}
    resolved = values | {key: value for part in parts for key, value in dataclasses.asdict(part).items()}
    return Recipe(path, method, thinking, model, data, evaluation, extra, training, resolved)


def check_thought(method: str, thinking: Thinking, extra: Any) -> None:
    """Raises ValueError for a thought kind that the method cannot train."""
    thought, rl = thinking.thought, method in RL_METHODS
    if rl and thought == "soft":
        raise ValueError(
            "thought soft has no density (it is a point mass): RL cannot train it; use gumbel, dirichlet or token"
        )
    if rl and thought == "hidden":
        raise ValueError(
            "thought hidden has no density (it is a point mass): RL cannot train it; use hybrid, which a checkpoint "
            "of thought hidden can go on to"
        )
    if method == "codi" and thought == "dirichlet":
        raise ValueError(
            "thought dirichlet cannot be trained by codi: its weights are drawn, and no gradient flows through the "
            "draw; warm up with gumbel or soft, and run RL with thought dirichlet"
        )
    if method == "codi" and thought == "hybrid" and not extra.use_projector:
        raise ValueError(
            "use_projector false: thought hybrid is the projected state plus a mixture; use thought hidden"
        )
    if rl and thought == "dirichlet" and extra.ratio != "joint":
        raise ValueError(f"ratio {extra.ratio} is made for gumbel thoughts; thought dirichlet takes ratio joint")
    if rl and thought == "hybrid" and extra.ratio in ("pathwise", "conditional"):
        raise ValueError(
            f"ratio {extra.ratio} is made for gumbel thoughts; thought hybrid takes joint, factored or top1"
        )


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises ValueError for a tracker that is unknown or not installed, before anything is trained."""
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            raise ValueError(
                f"report_to must be none or of {', '.join(TRACKERS)}, got {name!r}"
                + (f"; did you mean {near[0]}?" if near else "")
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(f"report_to: {name} is not installed; pip install {name}")


def load_evaluation(
    model: str, overrides: dict[str, Any], group: type = EvaluationArguments, command: str = "eval"
) -> tuple[Any, dict[str, Any]]:
    """The arguments of `rl-soft eval` or another command on a model, and the fields of `Thinking` among them, which
    change the model's own.

    Raises:
        ValueError: an unknown key (with the nearest valid one), or a value of the wrong type or out of range.
    """
    fields = {f.name: f for part in (group, Thinking) for f in dataclasses.fields(part)}
    if "model_name_or_path" in overrides:
        raise ValueError(f"model_name_or_path is the first argument of {command}, here {model!r}; leave the key out")
    values = {"model_name_or_path": model, **overrides}
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, sorted(fields), n=1)
            hint = f"; did you mean --{near[0]}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ValueError(f"{command} knows no --{key}{hint}")
        values[key] = _check_type(fields[key], values[key])
    names = {f.name for f in dataclasses.fields(group)}
    arguments = group(**{key: value for key, value in values.items() if key in names})
    return arguments, {key: value for key, value in values.items() if key not in names}


def device_defaults() -> dict[str, Any]:
    """Precision and device by what is there. On CPU `use_cpu` must be an argument of the trainer: as an accelerate
    setting or in the environment it turns DeepSpeed or the second process off without a word."""
    import torch

    if torch.cuda.is_available():
        return {"use_cpu": False, "bf16": torch.cuda.is_bf16_supported()}
    return {"use_cpu": True, "bf16": False}


def batch_plan(recipe: Recipe, world_size: int) -> dict[str, int]:
    """TRL's batch fields from prompts_per_step, num_generations, per_device_train_batch_size, updates_per_rollout.

    Raises:
        ValueError: a rollout that does not divide, with the nearest valid value.
    """
    G = int(recipe.training.get("num_generations", 8))
    per_device = int(recipe.training.get("per_device_train_batch_size", 8))
    P, updates = recipe.extra.prompts_per_step, recipe.extra.updates_per_rollout
    rows, slice_rows = P * G, per_device * world_size * updates
    if min(G, per_device, P, updates) < 1 or rows % slice_rows:
        valid = [b for b in range(1, rows + 1) if rows % (b * world_size * updates) == 0]
        if not valid:
            raise ValueError(
                f"prompts_per_step x num_generations = {P} x {G} = {rows} completions do not divide over "
                f"{world_size} processes and {updates} updates_per_rollout"
            )
        near = min(valid, key=lambda b: (abs(b - per_device), -b))
        raise ValueError(
            f"per_device_train_batch_size must divide prompts_per_step x num_generations / processes / "
            f"updates_per_rollout = {P} x {G} / {world_size} / {updates}; got {per_device}, nearest valid {near}"
        )
    steps = rows // (per_device * world_size)
    return {"steps_per_generation": steps, "gradient_accumulation_steps": steps // updates}


def write_config(recipe: Recipe) -> None:
    """Store the resolved recipe in its run directory (temporary name, then rename)."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    target = recipe.output_dir / "config.yaml"
    temporary = target.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(recipe.values, sort_keys=True, allow_unicode=True))
    os.replace(temporary, target)


def check_output_dir(recipe: Recipe) -> bool:
    """Whether the run directory already holds this run (to be resumed).

    Raises:
        ValueError: it holds another run, with the first key that differs. Nothing is ever overwritten.
    """
    stored = recipe.output_dir / "config.yaml"
    if not stored.exists():
        if recipe.output_dir.exists() and any(p.name != "config.tmp" for p in recipe.output_dir.iterdir()):
            raise ValueError(f"output_dir {recipe.output_dir} is not empty and holds no run; choose another")
        return False
    # A field that did not exist when the run was made had, in effect, its default.
    defaults = {k: v for group in GROUPS[recipe.method] for k, v in dataclasses.asdict(group()).items()}
    before = defaults | yaml.load(stored.read_text(), Loader=_Loader)
    for key in sorted((before.keys() | recipe.values.keys()) - {"output_dir"}):  # a run may be moved
        if before.get(key) != recipe.values.get(key):
            raise ValueError(
                f"output_dir {recipe.output_dir} holds a run with {key} = {before.get(key)!r}, this one has "
                f"{recipe.values.get(key)!r}; choose another output_dir to keep both"
            )
    return True
