"""The keys of recipes and commands. Each field holds type, bounds, choices, default and help of its key.

What concerns several keys of one class is checked here too; what concerns a recipe as a whole, in `recipe` and
`refusals`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from rl_soft.keys import Number, OneOf, keys, nearest
from rl_soft.thoughts.kinds import KINDS, RATIOS
from rl_soft.thoughts.thinking import CONTROLS

ANALYSES = ("probe", "cost", "traces", "branching", "lens", "plane", "all")  # kinds of `rl-soft analyze`
MAX_SHOWN = 10  # entries of a thought that `rl-soft generate` can show


@keys()
class WeightArguments:
    """How weights are loaded."""

    dtype: Annotated[str, OneOf(("float32", "bfloat16", "float16"))] = Field(
        default="float32", description="dtype of the weights: float32, bfloat16 or float16."
    )
    attn_implementation: str | None = Field(
        default=None, description="sdpa, eager, flash_attention_2, or float64 (small models)."
    )


@keys()
class SourceArguments:
    """Where problems come from (see docs/data.md)."""

    dataset: str = Field(default="", description="Generator name, known data set, local file, or hub id.")
    dataset_options: dict[str, Any] | None = Field(default=None, description="Options of the source.")
    dataset_columns: dict[str, str] | None = Field(
        default=None, description="Names of a file's columns: {question: ..., answer: ..., steps: ...}."
    )


@keys()
class ModelArguments(WeightArguments):
    """Which weights a run starts from: warm_start, model_name_or_path, or random weights from model_config."""

    warm_start: str | None = Field(
        default=None, description="A recipe whose result this run starts from; trained first if missing."
    )
    model_name_or_path: str | None = Field(default=None, description="Model folder or hub id.")
    model_config: dict[str, Any] | None = Field(
        default=None, description="transformers config of a model with random weights: {model_type: llama, ...}."
    )
    vocabulary: str | None = Field(
        default=None, description="The characters of the character tokenizer that goes with model_config."
    )
    use_peft: bool = Field(default=False, description="Train a LoRA adapter instead of all weights.")
    lora_r: int = Field(default=32, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(default=64, description="LoRA alpha; the update is scaled by alpha / r.")
    lora_dropout: Number = Field(
        default=0.0, ge=0, lt=1, description="LoRA dropout, for supervised methods; RL takes none."
    )
    lora_target_modules: str | list[str] = Field(
        default="all-linear", description="Modules that get an adapter: names, or all-linear."
    )


@keys()
class DataArguments(SourceArguments):
    """Training and evaluation problems."""

    train_size: int | None = Field(default=None, ge=1, description="Number of training problems; all if absent.")
    data_seed_train: int = Field(default=1, description="Seed of generated training problems.")
    eval_dataset: str | None = Field(default=None, description="Evaluation source; dataset if absent.")
    eval_dataset_options: dict[str, Any] | None = Field(default=None, description="Options of eval_dataset.")
    eval_dataset_columns: dict[str, str] | None = Field(default=None, description="Names of eval_dataset's columns.")
    eval_problems: int = Field(default=256, ge=0, description="Number of held-out problems; 0 skips the evaluation.")
    data_seed_eval: int = Field(default=2, description="Seed of generated evaluation problems.")


@keys()
class EvalArguments:
    """Pass@k before and after a run."""

    eval_samples: int = Field(
        default=32, ge=1, description="n, sampled completions per problem; a greedy one is added."
    )
    eval_k: list[int] = Field(default_factory=lambda: [1, 2, 4, 8, 16], description="The k of Pass@k.")
    eval_batch_size: int = Field(default=512, ge=1, description="Completions decoded together per process.")
    eval_seed: int = Field(default=7, description="Seed of the evaluation's noise; the same before and after.")


# ---------------------------------------------------------------------------------------------------------------------
# Commands on a model


@keys()
class OnModelArguments(WeightArguments, SourceArguments):
    """The model and the problems of a command."""

    model_name_or_path: str = Field(default="", description="Model folder, PEFT folder or hub id.")
    split: str = Field(default="evaluation", description="evaluation, train, or a split of the hub's.")
    eval_problems: int | None = Field(default=None, ge=1, description="Number of problems; all if absent.")
    data_seed_eval: int = Field(default=2, description="Seed of generated problems or of the draw.")


@keys()
class EvaluationArguments(OnModelArguments):
    """`rl-soft eval MODEL`: these and the fields of `Thinking` and `Decoding`; a recipe's keys mean the same here."""

    output_dir: str = Field(default="", description="Directory of the records and the report.")
    eval_samples: int = Field(
        default=32, ge=1, description="n, sampled completions per problem; a greedy one is added."
    )
    eval_k: list[int] | None = Field(default=None, description="The k of Pass@k; powers of two if absent.")
    eval_batch_size: int = Field(default=64, ge=1, description="Completions decoded together per process.")
    eval_seed: int = Field(default=7, description="Seed of the noise.")
    confirm_run_unsafe_code: bool = Field(
        default=False, description="Run the programs that the model writes (humaneval, mbpp)."
    )
    control: Annotated[str, OneOf(CONTROLS)] = Field(
        default="none", description="What is done to the thoughts that are fed: none, zero, shuffle or repeat."
    )
    thoughts: str | list[str] | None = Field(
        default=None,
        description="Thought kinds to evaluate side by side, token,soft,gumbel for example; each into a folder of its "
        "name in output_dir, and their comparison with token into output_dir.",
    )

    def __post_init__(self) -> None:
        if self.thoughts is not None:
            self.thoughts = _with_token(self.thoughts)
        for name in ("model_name_or_path", "output_dir", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: rl-soft eval MODEL --dataset NAME --output_dir DIR")
        if self.eval_k and not 1 <= min(self.eval_k) <= max(self.eval_k) <= self.eval_samples:
            raise ValueError(f"eval_k must be between 1 and eval_samples ({self.eval_samples}), got {self.eval_k}")


def _with_token(thoughts: str | list[str]) -> list[str]:
    """Thought kinds, each once; token comes first: its greedy and sampled completions are the baselines."""
    kinds = [kind.strip() for kind in (thoughts.split(",") if isinstance(thoughts, str) else thoughts)]
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"thoughts must be of {', '.join(KINDS)}, got {kind!r}{nearest(kind, KINDS)}")
    if set(kinds) <= {"token"}:
        raise ValueError(f"thoughts must name a kind to compare with token, got {thoughts!r}; soft,gumbel for example")
    return list(dict.fromkeys(["token", *kinds]))


@keys()
class GenerateArguments(OnModelArguments):
    """`rl-soft generate MODEL`: these and the fields of `Thinking` and `Decoding`."""

    prompt: str | None = Field(default=None, description="One question.")
    prompts: str | None = Field(
        default=None, description="A file of questions: one per line, or .jsonl with `question` (and `id`)."
    )
    samples: int = Field(default=1, ge=1, description="Completions of each question.")
    seed: int = Field(default=0, description="Seed of the noise.")
    greedy: bool = Field(default=False, description="One completion of each question, without noise.")
    batch_size: int = Field(default=16, ge=1, description="Completions decoded together.")
    show: int = Field(
        default=3,
        ge=0,
        le=MAX_SHOWN,
        description="Entries of a soft thought in the terminal, one thought per line; 0: running text.",
    )
    json: bool = Field(default=False, description="One JSON object per completion on stdout, and nothing else.")
    output: str | None = Field(
        default=None, description="A .jsonl file that completions are appended to; what it has is not redone."
    )

    def __post_init__(self) -> None:
        sources = [name for name in ("prompt", "prompts", "dataset") if getattr(self, name)]
        if len(sources) != 1:
            raise ValueError(
                "generate needs one of --prompt TEXT, --prompts FILE and --dataset NAME, not "
                f"{' and '.join(sources) or 'none of them'}"
            )
        if self.greedy and self.samples > 1:
            raise ValueError(f"samples must be 1 where greedy is true: nothing is drawn; got {self.samples}")


@keys()
class AnalysisArguments(OnModelArguments):
    """`rl-soft analyze KIND MODEL`; see docs/analyses.md, and docs/baselines.md for probe and cost."""

    against: str | None = Field(default=None, description="cost: the model that writes its reasoning.")
    output_dir: str | None = Field(
        default=None, description="Where figures are written; and records, by analyses of traces, which need it."
    )
    eval_batch_size: int = Field(default=64, ge=1, description="Problems decoded together.")
    eval_seed: int = Field(default=7, description="traces, plane: seed of the noise.")
    eval_samples: int = Field(default=1, ge=1, description="traces: n, the traces of each random kind per problem.")
    branch_weight: Number = Field(
        default=0.1,
        ge=0,
        lt=0.5,
        description="branching, plane: a thought branches from this weight of its second id on.",
    )
    branches: int = Field(
        default=4, ge=1, description="lens: thoughts per problem, those with the heaviest second id."
    )
    draws: int = Field(default=16, ge=1, description="plane: draws of the weights per thought and parameter.")
    evals: str | list[str] | None = Field(
        default=None, description="all: evaluation directories whose Pass@k curves go into the report."
    )
    top_k: int = Field(default=5, ge=1, description="probe: tokens of a thought that are looked at.")

    def __post_init__(self) -> None:
        if not self.dataset:
            raise ValueError("dataset is missing: rl-soft analyze KIND MODEL --dataset NAME")


@keys()
class EstimateArguments:
    """`rl-soft estimate RECIPE`: these and the keys of the recipe."""

    memory: Number | None = Field(default=None, ge=0, description="GiB per process; exit code 1 if a step takes more.")
    zero: int = Field(default=0, ge=0, le=3, description="ZeRO stage; 0 is without DeepSpeed.")
    processes: int = Field(default=1, ge=1, description="Number of processes.")
    prompt_tokens: int = Field(default=256, ge=1, description="Tokens of the longest prompt.")


# ---------------------------------------------------------------------------------------------------------------------
# Methods


@keys()
class SupervisedArguments:
    """What the methods that learn from worked solutions share."""

    max_row_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Rows longer than this, with steps and thoughts, are left out and counted; without it a row "
        "longer than the model is an error.",
    )
    stop_at_accuracy: Number | None = Field(
        default=None, description="Stop once sampled validation accuracy reaches this; null trains max_steps."
    )
    validation_problems: int = Field(default=256, ge=0, description="Training-side problems held out for validation.")
    validation_every: int = Field(default=50, ge=1, description="Steps between validations.")


@keys()
class CodiArguments(SupervisedArguments):
    """L = alpha L_student + beta L_KD + gamma L_teacher (CODI, arXiv 2502.21074, Eq. 5)."""

    alpha: Number = Field(default=1.0, ge=0, description="Weight of the student's cross-entropy on the answer.")
    beta: Number = Field(default=1.0, ge=0, description="Weight of the distillation loss on the hidden states.")
    gamma: Number = Field(default=1.0, ge=0, description="Weight of the teacher's cross-entropy on steps and answer.")
    kd_loss: Annotated[str, OneOf(("l1", "smooth_l1"))] = Field(
        default="smooth_l1", description="Distance of the hidden states: l1 or smooth_l1."
    )
    kd_as_released: bool = Field(
        default=False,
        description="Divide the distance by the teacher's std, as the released code does, and not the states.",
    )
    kd_layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="Distilled layers, 0 for the embeddings; all but the embeddings if absent.",
    )
    kd_position: Annotated[str, OneOf(("first", "answer"))] = Field(
        default="first",
        description="Distilled positions: first, what predicts the first answer token, or answer, all of them.",
    )
    teacher: str = Field(
        default="self",
        description="self, or a folder or recipe of a model that is the frozen teacher (then gamma is unused).",
    )
    use_projector: bool = Field(
        default=True, description="thought hidden: feed the state through the projector, or as it is."
    )
    projector_size: int | None = Field(
        default=None, ge=1, description="Width between the projector's layers; the model's if absent."
    )
    drop_last_step: bool = Field(default=True, description="Leave the teacher's last step out.")
    train_noise: bool = Field(
        default=True, description="Draw Gumbel noise on the student's thoughts (gumbel and hybrid)."
    )

    def __post_init__(self) -> None:
        if self.teacher != "self" and not self.beta:
            raise ValueError(f"teacher {self.teacher}: with beta 0 nothing is distilled from it; use teacher self")


@keys()
class SFTArguments(SupervisedArguments):
    """Supervised fine-tuning on worked solutions (CoT), or on answers alone (No-CoT)."""

    worked_steps: bool = Field(default=True, description="Train on the steps (CoT); false: No-CoT.")


@keys()
class ICoTArguments(SupervisedArguments):
    """The removal schedule of iCoT (arXiv 2405.14838)."""

    cot_epochs: Number = Field(default=0.0, ge=0, description="Epochs with the whole chain before removal begins.")
    remove_per_epoch: Number = Field(default=8.0, gt=0, description="Tokens removed from the left per epoch.")
    remove_all_beyond: int | None = Field(
        default=None, gt=0, description="Remove the whole chain once this many tokens are removed."
    )
    removal_smoothing: Number | None = Field(
        default=4.0, gt=0, description="lambda: o tokens more are removed with P(o) ~ exp(-lambda o); null: none more."
    )
    reset_optimizer: bool = Field(default=True, description="A fresh optimizer state at each removal.")


@keys()
class CoconutArguments(SupervisedArguments):
    """The curriculum of Coconut (arXiv 2412.06769)."""

    thoughts_per_step: int = Field(default=2, ge=1, description="c, the thoughts that replace a step of text.")
    cot_epochs: Number = Field(default=0.0, ge=0, description="Epochs of stage 0: every step is text.")
    epochs_per_stage: Number = Field(default=3.0, gt=0, description="Epochs of each stage but the last.")
    uniform_prob: Number = Field(
        default=0.0, ge=0, le=1, description="Share of rows trained at a random stage instead of the scheduled one."
    )
    reset_optimizer: bool = Field(default=True, description="A fresh optimizer state at each stage.")


@keys()
class RLArguments:
    """What our trainers add to TRL's GRPOConfig."""

    prompts_per_step: int = Field(default=32, ge=1, description="Prompts of one rollout, over all processes.")
    updates_per_rollout: int = Field(
        default=1, ge=1, description="Optimizer steps that split one rollout (mini-batches); times num_iterations."
    )
    rewards: list[Any] = Field(
        default_factory=lambda: ["math_accuracy"],
        description="Reward functions: names, dotted paths, or {Name: {parameter: value}}.",
    )
    ratio: Annotated[str, OneOf(RATIOS)] = Field(
        default="joint", description=f"Policy ratio of a thought: {', '.join(RATIOS)} (docs/grpo.md)."
    )
    rest_weight: Number = Field(
        default=1.0, ge=0, description="ratio factored: weight of log p(rest | strongest id) in the loss."
    )
    thought_epsilon: Number | None = Field(
        default=None, gt=0, description="Clip range of thoughts, both ways; that of answer tokens if absent."
    )
    chunk_size: int | None = Field(
        default=None, ge=1, description="Positions whose (chunk, V) logits are alive at once; by memory if absent."
    )


def refuse_pathwise(ratio: str | None) -> None:
    """Raises ValueError for a ratio that PPO cannot have: one where a thought is no action."""
    if ratio in RATIOS and RATIOS[ratio].scores is None:
        raise ValueError(
            f"ratio {ratio}: thoughts are then not actions and have no values; use joint, factored or top1, "
            "or method grpo"
        )


@keys()
class PPOArguments(RLArguments):
    """The value head and its advantages (docs/ppo.md)."""

    gamma: Number = Field(default=1.0, ge=0, le=1, description="Discount from one action to the next.")
    lam: Number = Field(default=0.95, ge=0, le=1, description="Lambda of generalised advantage estimation.")
    vf_coef: Number = Field(default=0.1, ge=0, description="Weight of the value loss, which reaches the trunk.")
    value_clip: Number | None = Field(
        default=0.2, gt=0, description="Clip range of a value around the rollout's; null does not clip."
    )
    value_learning_rate: Number = Field(default=1e-4, ge=0, description="Learning rate of the value head.")

    def __post_init__(self) -> None:
        refuse_pathwise(self.ratio)
