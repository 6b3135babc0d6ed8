"""The keys of recipes. Each field holds type, bounds, choices, default and help of its key; those of commands stand in
`commands`.

What concerns several keys of one class is checked here too; what concerns a recipe as a whole, in `recipe` and
`refusals`.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from rl_soft.keys import Number, OneOf, key, keys
from rl_soft.thoughts.decoding import ORDERS
from rl_soft.thoughts.kinds import RATIOS

logger = logging.getLogger("rl_soft")

DTYPES = ("float32", "bfloat16", "float16")  # of weights


@keys()
class WeightArguments:
    """How weights are loaded."""

    dtype: Annotated[str | None, OneOf(DTYPES)] = key(
        "dtype of the weights; if absent bfloat16 on a GPU that has it, and else float32 (docs/gpu.md).", default=None
    )
    attn_implementation: str | None = key("sdpa, eager, flash_attention_2, or float64 (small models).", default=None)
    model_revision: str | None = key("Branch, tag or commit of a hub id; its main one if absent.", default=None)


@keys()
class SourceArguments:
    """Where problems come from (see docs/data.md)."""

    dataset: str = key("Generator name, known data set, local file, or hub id.", default="")
    dataset_options: dict[str, Any] | None = key("Options of the source.", default=None)
    dataset_columns: dict[str, str] | None = key(
        "Names of columns: {question: NAME, answer: NAME, ...}.", default=None
    )


@keys()
class ModelArguments(WeightArguments):
    """Which weights a run starts from: warm_start, model_name_or_path, or random weights from model_config."""

    warm_start: str | None = key(
        "A recipe whose result this run starts from, trained first if missing; or the folder of such a run.",
        default=None,
    )
    model_name_or_path: str | None = key("Model folder or hub id.", default=None)
    model_config: dict[str, Any] | None = key("A config for random weights: {model_type: llama, ...}.", default=None)
    vocabulary: str | None = key("The characters of the tokenizer that goes with model_config.", default=None)
    use_peft: bool = key("Train a LoRA adapter instead of all weights.", default=False)
    lora_r: int = key("LoRA rank.", default=32, ge=1)
    lora_alpha: int = key("LoRA alpha; the update is scaled by alpha / r.", default=64)
    lora_dropout: Number = key("LoRA dropout, for supervised methods; RL takes none.", default=0.0, ge=0, lt=1)
    lora_target_modules: str | list[str] = key("Modules with an adapter: names, or all-linear.", default="all-linear")
    lora_modules_to_save: list[str] | None = key(
        "Modules trained whole and saved with the adapter, by name: [lm_head].", default=None, min_length=1
    )
    use_dora: bool = key("DoRA: a magnitude per output is trained beside the LoRA matrices.", default=False)
    use_rslora: bool = key("Scale the update by alpha / sqrt(r) instead of alpha / r.", default=False)
    load_in_4bit: bool = key("Weights of 4 bits under the adapter (QLoRA); needs bitsandbytes.", default=False)
    bnb_4bit_quant_type: Annotated[str, OneOf(("nf4", "fp4"))] = key("The 4-bit numbers.", default="nf4")
    bnb_4bit_compute_dtype: Annotated[str | None, OneOf(("float32", "bfloat16", "float16"))] = key(
        "dtype of products with 4-bit weights; dtype if absent.", default=None
    )
    use_bnb_nested_quant: bool = key("Quantise the scales of 4-bit weights, too.", default=False)


@keys()
class DataArguments(SourceArguments):
    """Training and evaluation problems."""

    train_size: int | None = key("Number of training problems; all if absent.", default=None, ge=1)
    data_seed_train: int = key("Seed of generated training problems.", default=1)
    eval_dataset: str | None = key("Evaluation source; dataset if absent.", default=None)
    eval_dataset_options: dict[str, Any] | None = key("Options of eval_dataset.", default=None)
    eval_dataset_columns: dict[str, str] | None = key("Names of eval_dataset's columns.", default=None)
    eval_problems: int = key("Number of held-out problems; 0 skips the evaluation.", default=256, ge=0)
    data_seed_eval: int = key("Seed of generated evaluation problems.", default=2)


@keys()
class EvalArguments:
    """Pass@k before and after a run."""

    eval_samples: int = key("n, sampled completions per problem; a greedy one is added.", default=32, ge=1)
    eval_k: list[int] = key("The k of Pass@k.", default_factory=lambda: [1, 2, 4, 8, 16])
    eval_batch_size: int = key("Completions decoded together per process.", default=512, ge=1)
    eval_seed: int = key("Seed of the evaluation's noise; the same before and after.", default=7)

    def __post_init__(self) -> None:
        self.eval_k = possible_k(self.eval_k, self.eval_samples)


@keys()
class TrackerArguments:
    """Where a tracker files a run; see docs/trackers.md."""

    wandb_project: str | None = key("The project; the environment variable WANDB_PROJECT if absent.", default=None)
    wandb_entity: str | None = key("The account or team; WANDB_ENTITY if absent.", default=None)
    wandb_run_group: str | None = key("The group of runs; WANDB_RUN_GROUP if absent.", default=None)


def possible_k(eval_k: list[int], eval_samples: int) -> list[int]:
    """The k of Pass@k; those above the number of samples become that number, and a line says so.

    Raises:
        ValueError: a k below 1.
    """
    if eval_k and min(eval_k) < 1:
        raise ValueError(f"eval_k must be at least 1 each, got {eval_k}")
    cut = sorted({min(k, eval_samples) for k in eval_k})
    if eval_k and max(eval_k) > eval_samples:
        logger.info("eval_k %s: eval_samples is %d, so it becomes %s", eval_k, eval_samples, cut)
    return cut


# ---------------------------------------------------------------------------------------------------------------------
# Methods


@keys()
class SupervisedArguments:
    """What the methods that learn from worked solutions share."""

    max_row_tokens: int | None = key(
        "Rows longer than this, with steps and thoughts, are left out and counted; without it a row "
        "longer than the model is an error.",
        default=None,
        ge=1,
    )
    stop_at_accuracy: Number | None = key("Stop once sampled validation accuracy is this; null: never.", default=None)
    validation_problems: int = key("Training-side problems held out for validation.", default=256, ge=0)
    validation_every: int = key("Steps between validations.", default=50, ge=1)


@keys()
class CodiArguments(SupervisedArguments):
    """L = alpha L_student + beta L_KD + gamma L_teacher (CODI, arXiv 2502.21074, Eq. 5)."""

    alpha: Number = key("Weight of the student's cross-entropy on the answer.", default=1.0, ge=0)
    beta: Number = key("Weight of the distillation loss on the hidden states.", default=1.0, ge=0)
    gamma: Number = key("Weight of the teacher's cross-entropy on steps and answer.", default=1.0, ge=0)
    kd_loss: Annotated[str, OneOf(("l1", "smooth_l1"))] = key("Distance of the hidden states.", default="smooth_l1")
    kd_as_released: bool = key("Divide the distance by the teacher's std, as the released code does.", default=False)
    kd_layers: list[int] | None = key(
        "Distilled layers, 0 for the embeddings; all but the embeddings if absent.", default=None, min_length=1
    )
    kd_position: Annotated[str, OneOf(("first", "answer"))] = key(
        "Distilled positions: first, what predicts the first answer token, or answer, all of them.", default="first"
    )
    teacher: str = key("self, or a folder or recipe of a frozen teacher (gamma is unused then).", default="self")
    use_projector: bool = key("thought hidden: feed the state through the projector, or as it is.", default=True)
    projector_size: int | None = key("Width inside the projector; the model's if absent.", default=None, ge=1)
    drop_last_step: bool = key("Leave the teacher's last step out.", default=True)
    train_noise: bool = key("Draw Gumbel noise on the student's thoughts (gumbel and hybrid).", default=True)

    def __post_init__(self) -> None:
        if self.teacher != "self" and not self.beta:
            raise ValueError(f"teacher {self.teacher}: with beta 0 nothing is distilled from it; use teacher self")


@keys()
class SFTArguments(SupervisedArguments):
    """Supervised fine-tuning on worked solutions (CoT), or on answers alone (No-CoT)."""

    worked_steps: bool = key("Train on the steps (CoT); false: No-CoT.", default=True)


@keys()
class ICoTArguments(SupervisedArguments):
    """The removal schedule of iCoT (arXiv 2405.14838)."""

    cot_epochs: Number = key("Epochs with the whole chain before removal begins.", default=0.0, ge=0)
    remove_per_epoch: Number = key("Tokens removed from the left per epoch.", default=8.0, gt=0)
    remove_all_beyond: int | None = key("Remove the whole chain once so many tokens are removed.", default=None, gt=0)
    removal_smoothing: Number | None = key(
        "lambda: o tokens more are removed with P(o) ~ exp(-lambda o); null: none more.", default=4.0, gt=0
    )
    reset_optimizer: bool = key("A fresh optimizer state at each removal.", default=True)


@keys()
class CoconutArguments(SupervisedArguments):
    """The curriculum of Coconut (arXiv 2412.06769)."""

    thoughts_per_step: int = key("c, the thoughts that replace one step of text.", default=2, ge=1)
    cot_epochs: Number = key("Epochs of stage 0: every step is text.", default=0.0, ge=0)
    epochs_per_stage: Number = key("Epochs of each stage but the last.", default=3.0, gt=0)
    uniform_prob: Number = key("Share of rows at a random stage, not the scheduled one.", default=0.0, ge=0, le=1)
    reset_optimizer: bool = key("A fresh optimizer state at each stage.", default=True)


@keys()
class RLArguments:
    """What our trainers add to TRL's GRPOConfig."""

    prompts_per_step: int = key("Prompts of one rollout, over all processes.", default=32, ge=1)
    updates_per_rollout: int = key(
        "Optimizer steps per rollout (mini-batches); times num_iterations.", default=1, ge=1
    )
    rewards: list[Any] = key(
        "Reward functions: names, dotted paths, or {Name: {parameter: value}}.",
        default_factory=lambda: ["math_accuracy"],
    )
    ratio: Annotated[str, OneOf(RATIOS)] = key("Policy ratio of a thought (docs/grpo.md).", default="joint")
    rest_weight: Number = key("ratio factored: weight of log p(rest | strongest id) in the loss.", default=1.0, ge=0)
    thought_epsilon: Number | None = key(
        "Clip range of thoughts, both ways; the tokens' if absent.", default=None, gt=0
    )
    chunk_size: int | None = key("Positions whose logits are alive at once; by memory if absent.", default=None, ge=1)
    order: Annotated[str, OneOf(ORDERS)] = key(
        "exact: noise on all that top_k, top_p and min_p leave. paper: gumbel noise on the K most probable ids alone.",
        default="exact",
    )


@keys()
class GRPOArguments(RLArguments):
    """Which groups teach (docs/groups.md)."""

    filter_groups: str | None = key(
        "The reward by which groups are judged, `accuracy` or its name: a group in which it has one value leaves the "
        "loss; null: none does.",
        default=None,
    )
    resample: bool = key("Put other problems into the places of such groups.", default=False)
    max_resamples: int = key("Extra rollouts at most, per rollout.", default=3, ge=1)

    def __post_init__(self) -> None:
        if self.resample and self.filter_groups is None:
            raise ValueError(
                "resample true needs filter_groups, which says which groups are replaced: filter_groups: accuracy"
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

    gamma: Number = key("Discount from one action to the next.", default=1.0, ge=0, le=1)
    lam: Number = key("Lambda of generalised advantage estimation.", default=0.95, ge=0, le=1)
    vf_coef: Number = key("Weight of the value loss, which reaches the trunk.", default=0.1, ge=0)
    value_clip: Number | None = key("Clip range of a value around the rollout's; null: none.", default=0.2, gt=0)
    value_learning_rate: Number = key("Learning rate of the value head.", default=1e-4, ge=0)

    def __post_init__(self) -> None:
        refuse_pathwise(self.ratio)
