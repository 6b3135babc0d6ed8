"""The keys of recipes and commands: every field with its help text and the check of its own value.

What concerns several fields, or the recipe as a whole, is checked by `config`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

from rl_soft.thoughts.thinking import CONTROLS, THOUGHTS

KD_LOSSES, KD_POSITIONS = ("l1", "smooth_l1"), ("first", "answer")
RATIOS = ("joint", "factored", "top1", "conditional", "pathwise")
DTYPES = ("float32", "bfloat16", "float16")
MAX_SHOWN = 10  # entries of a thought that `rl-soft generate` can show


def check_dtype(name: str) -> None:
    """Raises ValueError for a dtype that weights cannot have here."""
    if name not in DTYPES:
        near = difflib.get_close_matches(name, DTYPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}{hint}")


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
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, or float64 (small models)."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank."})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha; the update is scaled by alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout, for supervised methods; RL takes none."})
    lora_target_modules: str | list[str] = field(
        default="all-linear", metadata={"help": "Modules that get an adapter: names, or all-linear."}
    )

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be at least 0 and below 1, got {self.lora_dropout}")


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
    eval_dataset_columns: dict[str, str] | None = field(
        default=None, metadata={"help": "Names of eval_dataset's columns."}
    )
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
    """`rl-soft eval MODEL`: these and the fields of `Thinking` and `Decoding`; a recipe's keys mean the same here."""

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
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, or float64 (small models)."}
    )
    confirm_run_unsafe_code: bool = field(
        default=False, metadata={"help": "Run the programs that the model writes (humaneval, mbpp)."}
    )
    control: str = field(
        default="none", metadata={"help": "What is done to the thoughts that are fed: none, zero, shuffle or repeat."}
    )
    thoughts: str | list[str] | None = field(
        default=None,
        metadata={
            "help": "Thought kinds to evaluate side by side, token,soft,gumbel for example; each into a folder of its "
            "name in output_dir, and their comparison with token into output_dir."
        },
    )

    def __post_init__(self) -> None:
        if self.thoughts is not None:
            self.thoughts = _kinds(self.thoughts)
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
        check_dtype(self.dtype)


def _kinds(thoughts: str | list[str]) -> list[str]:
    """Thought kinds, each once; token, whose greedy and sampled completions are the baselines, comes first."""
    kinds = [str(kind).strip() for kind in (thoughts.split(",") if isinstance(thoughts, str) else thoughts)]
    for kind in kinds:
        if kind not in THOUGHTS:
            near = difflib.get_close_matches(kind, THOUGHTS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"thoughts must be of {', '.join(THOUGHTS)}, got {kind!r}{hint}")
    if set(kinds) <= {"token"}:
        raise ValueError(f"thoughts must name a kind to compare with token, got {thoughts!r}; soft,gumbel for example")
    return list(dict.fromkeys(["token", *kinds]))


@dataclass
class GenerateArguments:
    """`rl-soft generate MODEL`: these and the fields of `Thinking` and `Decoding`."""

    model_name_or_path: str = field(default="", metadata={"help": "Model folder, PEFT folder or hub id."})
    prompt: str | None = field(default=None, metadata={"help": "One question."})
    prompts: str | None = field(
        default=None, metadata={"help": "A file of questions: one a line, or .jsonl with `question` (and `id`)."}
    )
    dataset: str = field(default="", metadata={"help": "Questions of a data set: generator, known set, file, hub id."})
    dataset_options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the source."})
    dataset_columns: dict[str, str] | None = field(default=None, metadata={"help": "Names of a file's columns."})
    split: str = field(default="evaluation", metadata={"help": "evaluation, train, or a split of the hub's."})
    eval_problems: int | None = field(default=None, metadata={"help": "Number of problems; all if absent."})
    data_seed_eval: int = field(default=2, metadata={"help": "Seed of generated problems or of the draw."})
    samples: int = field(default=1, metadata={"help": "Completions of each question."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise."})
    greedy: bool = field(default=False, metadata={"help": "One completion of each question, without noise."})
    batch_size: int = field(default=16, metadata={"help": "Completions decoded together."})
    show: int = field(
        default=3, metadata={"help": "Entries of a soft thought in the terminal, one thought a line; 0: running text."}
    )
    json: bool = field(default=False, metadata={"help": "One JSON object a completion on stdout, and nothing else."})
    output: str | None = field(
        default=None, metadata={"help": "A .jsonl file that completions are appended to; what it has is not redone."}
    )
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, or float64 (small models)."}
    )

    def __post_init__(self) -> None:
        sources = [name for name in ("prompt", "prompts", "dataset") if getattr(self, name)]
        if len(sources) != 1:
            raise ValueError(
                "generate needs one of --prompt TEXT, --prompts FILE and --dataset NAME, not "
                f"{' and '.join(sources) or 'none of them'}"
            )
        for name in ("samples", "batch_size", "eval_problems"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.greedy and self.samples > 1:
            raise ValueError(f"samples must be 1 where greedy is true: nothing is drawn; got {self.samples}")
        if not 0 <= self.show <= MAX_SHOWN:
            raise ValueError(f"show must be between 0 (running text) and {MAX_SHOWN}, got {self.show}")
        check_dtype(self.dtype)


@dataclass
class AnalysisArguments:
    """`rl-soft analyze KIND MODEL`; see docs/analyses.md, and docs/baselines.md for probe and cost."""

    model_name_or_path: str = field(default="", metadata={"help": "Model folder; hub id for analyses of traces."})
    against: str | None = field(default=None, metadata={"help": "cost: the model that writes its reasoning."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where figures are written; and records, by analyses of traces, which need it."},
    )
    dataset: str = field(default="", metadata={"help": "Generator name, known data set, local file, or hub id."})
    dataset_options: dict[str, Any] | None = field(default=None, metadata={"help": "Options of the source."})
    dataset_columns: dict[str, str] | None = field(default=None, metadata={"help": "Names of a file's columns."})
    split: str = field(default="evaluation", metadata={"help": "evaluation, train, or a split of the hub's."})
    eval_problems: int | None = field(default=None, metadata={"help": "Number of problems; all if absent."})
    data_seed_eval: int = field(default=2, metadata={"help": "Seed of generated problems or of the draw."})
    eval_batch_size: int = field(default=64, metadata={"help": "Problems decoded together."})
    eval_seed: int = field(default=7, metadata={"help": "traces, plane: seed of the noise."})
    eval_samples: int = field(default=1, metadata={"help": "traces: n, traces of each random kind a problem."})
    branch_weight: float = field(
        default=0.1, metadata={"help": "branching, plane: from which weight of the second id on a step branches."}
    )
    branches: int = field(default=4, metadata={"help": "lens: steps of a problem, those with the heaviest second id."})
    draws: int = field(default=16, metadata={"help": "plane: draws of the weights at a step, for each parameter."})
    evals: str | list[str] | None = field(
        default=None, metadata={"help": "all: evaluation directories whose Pass@k curves go into the report."}
    )
    top_k: int = field(default=5, metadata={"help": "probe: tokens of a thought that are looked at."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the weights: float32, bfloat16 or float16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, eager, flash_attention_2."})

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset is missing: rl-soft analyze KIND MODEL --dataset NAME")
        if not 0 <= self.branch_weight < 0.5:
            raise ValueError(f"branch_weight must be at least 0 and below 0.5, got {self.branch_weight}")
        for name in ("eval_problems", "eval_batch_size", "eval_samples", "branches", "draws", "top_k"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        check_dtype(self.dtype)


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
    kd_loss: str = field(default="smooth_l1", metadata={"help": "Distance of the hidden states: l1 or smooth_l1."})
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
    drop_last_step: bool = field(default=True, metadata={"help": "Leave the teacher's last step out."})
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


def refuse_pathwise(ratio: str | None) -> None:
    """Raises ValueError for the ratio that PPO cannot have."""
    if ratio == "pathwise":
        raise ValueError(
            "ratio pathwise: thoughts are then not actions and have no values; use joint, factored or top1, "
            "or method grpo"
        )


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
        refuse_pathwise(self.ratio)
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("vf_coef", "value_learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"value_clip must be above 0, or null for no clipping, got {self.value_clip}")
