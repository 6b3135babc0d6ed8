"""The keys of recipes and commands. Each field holds type, bounds, choices, default and help of its key.

What concerns several keys of one class is checked here too; what concerns a recipe as a whole, in `recipe` and
`refusals`.
"""

from __future__ import annotations

import logging
from typing import Annotated, Any

from rl_soft.keys import Number, OneOf, either, key, keys, nearest
from rl_soft.thoughts.decoding import ORDERS
from rl_soft.thoughts.kinds import ENGINES, KINDS, RATIOS
from rl_soft.thoughts.thinking import CONTROLS

logger = logging.getLogger("rl_soft")

ANALYSES = ("probe", "cost", "traces", "branching", "lens", "plane", "all")  # kinds of `rl-soft analyze`
DTYPES = ("float32", "bfloat16", "float16")  # of weights
MAX_SHOWN = 10  # entries of a thought that `rl-soft generate` can show


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
# Commands on a model


@keys()
class EngineArguments:
    """Who makes the completions (see docs/vllm.md)."""

    engine: Annotated[str, OneOf(ENGINES)] = key(
        "; ".join(f"{name}: {engine.help}" for name, engine in ENGINES.items()) + ".", default="ours"
    )
    server: str | None = key("http://HOST:PORT of an rl-soft serve with this model; it has engine vllm.", default=None)


def settle_engine(arguments: Any, control: str = "none") -> None:
    """With a server the engine is vLLM. Raises ValueError for what the engine cannot do."""
    if arguments.server is not None:
        arguments.engine = "vllm"
    if arguments.engine != "ours" and arguments.model_revision not in (None, "main"):
        raise ValueError(
            f"model_revision {arguments.model_revision!r} is not available with engine {arguments.engine}; fetch it "
            "(hf download ID --revision REVISION --local-dir DIR) and name the folder"
        )
    if control != "none" and not ENGINES[arguments.engine].controls:
        able = either([name for name, engine in ENGINES.items() if engine.controls])
        raise ValueError(f"control {control} is not available with engine {arguments.engine}; use engine {able}")


@keys()
class OnModelArguments(WeightArguments, EngineArguments, SourceArguments):
    """The model and the problems of a command."""

    model_name_or_path: str = key("Model folder, PEFT folder or hub id.", default="")
    split: str = key("evaluation, train, or a split of the hub's.", default="evaluation")
    eval_problems: int | None = key("Number of problems; all if absent.", default=None, ge=1)
    data_seed_eval: int = key("Seed of generated problems or of the draw.", default=2)


@keys()
class EvaluationArguments(OnModelArguments):
    """`rl-soft eval MODEL`: these and the fields of `Thinking` and `Decoding`; a recipe's keys mean the same here."""

    like: str | None = key(
        "A run or an evaluation: data, template, caps, samples and seed are its own, unless given.", default=None
    )
    output_dir: str = key("Directory of the records and the report.", default="")
    eval_samples: int = key("n, sampled completions per problem; a greedy one is added.", default=32, ge=1)
    eval_k: list[int] | None = key("The k of Pass@k; powers of two if absent.", default=None)
    eval_batch_size: int = key("Completions decoded together per process.", default=64, ge=1)
    eval_seed: int = key("Seed of the noise.", default=7)
    confirm_run_unsafe_code: bool = key(
        "Run the programs that the model writes (humaneval, mbpp, livecodebench).", default=False
    )
    control: Annotated[str, OneOf(CONTROLS)] = key("What is done to the thoughts that are fed.", default="none")
    thoughts: str | list[str] | None = key(
        "Thought kinds to evaluate side by side, token,soft,gumbel for example; each into a folder of its "
        "name in output_dir, and their comparison with token into output_dir.",
        default=None,
    )

    def __post_init__(self) -> None:
        settle_engine(self, self.control)
        if self.thoughts is not None:
            self.thoughts = _with_token(self.thoughts)
        for name in ("model_name_or_path", "output_dir", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: rl-soft eval MODEL --dataset NAME --output_dir DIR")
        if self.eval_k:
            self.eval_k = possible_k(self.eval_k, self.eval_samples)


def _with_token(thoughts: str | list[str]) -> list[str]:
    """Thought kinds, each once; token comes first: its greedy and sampled completions are the baselines."""
    kinds = [kind.strip() for kind in (thoughts.split(",") if isinstance(thoughts, str) else thoughts)]
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"thoughts must be of {', '.join(KINDS)}, got {kind!r}{nearest(kind, KINDS)}")
    tokens = [name for name, kind in KINDS.items() if kind.discrete]
    if set(kinds) <= set(tokens):
        raise ValueError(f"thoughts must name a kind to compare with token, got {thoughts!r}; soft,gumbel for example")
    return list(dict.fromkeys([*tokens, *kinds]))


@keys()
class GenerateArguments(OnModelArguments):
    """`rl-soft generate MODEL`: these and the fields of `Thinking` and `Decoding`."""

    prompt: str | None = key("One question.", default=None)
    prompts: str | None = key("A file of questions: one per line, or .jsonl with `question` (and `id`).", default=None)
    samples: int = key("Completions of each question.", default=1, ge=1)
    seed: int = key("Seed of the noise.", default=0)
    greedy: bool = key("One completion of each question, without noise.", default=False)
    batch_size: int = key("Completions decoded together.", default=16, ge=1)
    show: int = key(
        "Entries of a soft thought in the terminal, one thought per line; 0: running text.",
        default=3,
        ge=0,
        le=MAX_SHOWN,
    )
    json: bool = key("One JSON object per completion on stdout, and nothing else.", default=False)
    output: str | None = key("A .jsonl file to append completions to; what it has is not redone.", default=None)

    def __post_init__(self) -> None:
        settle_engine(self)
        sources = [name for name in ("prompt", "prompts", "dataset") if getattr(self, name)]
        if len(sources) != 1:
            raise ValueError(
                "generate needs one of --prompt TEXT, --prompts FILE and --dataset NAME, not "
                f"{' and '.join(sources) or 'none of them'}"
            )
        if self.greedy and self.samples > 1:
            raise ValueError(f"samples must be 1 where greedy is true: nothing is drawn; got {self.samples}")


@keys()
class HarnessArguments(WeightArguments):
    """A model in lm-eval or lighteval: these and the fields of `Thinking` and `Decoding` (docs/harnesses.md)."""

    model_name_or_path: str = key("Model folder, PEFT folder or hub id.", default="")
    seed: int = key("Seed of the noise, where a task samples.", default=7)
    batch_size: int = key("Completions decoded together.", default=16, ge=1)


@keys()
class AnalysisArguments(OnModelArguments):
    """`rl-soft analyze KIND MODEL`; see docs/analyses.md, and docs/baselines.md for probe and cost."""

    against: str | None = key("cost: the model that writes its reasoning.", default=None)
    output_dir: str | None = key("Where figures are written, and the records of analyses of traces.", default=None)
    eval_batch_size: int = key("Problems decoded together.", default=64, ge=1)
    eval_seed: int = key("traces, plane: seed of the noise.", default=7)
    eval_samples: int = key("traces: n, the traces of each random kind per problem.", default=1, ge=1)
    branch_weight: Number = key(
        "branching, plane: a thought branches from this weight of its second id on.", default=0.1, ge=0, lt=0.5
    )
    branches: int = key("lens: thoughts per problem, those with the heaviest second id.", default=4, ge=1)
    draws: int = key("plane: draws of the weights per thought and parameter.", default=16, ge=1)
    evals: str | list[str] | None = key("all: evaluation directories whose Pass@k goes into the report.", default=None)
    top_k: int = key("probe: tokens of a thought that are looked at.", default=5, ge=1)

    def __post_init__(self) -> None:
        settle_engine(self)
        if not self.dataset:
            raise ValueError("dataset is missing: rl-soft analyze KIND MODEL --dataset NAME")


@keys()
class EstimateArguments:
    """`rl-soft estimate RECIPE`: these and the keys of the recipe."""

    memory: Number | None = key("GiB per process; exit code 1 if a step takes more.", default=None, ge=0)
    zero: int = key("ZeRO stage; 0 is without DeepSpeed.", default=0, ge=0, le=3)
    fsdp: bool = key("FSDP2 in place of ZeRO.", default=False)
    processes: int = key("Number of processes.", default=1, ge=1)
    prompt_tokens: int = key("Tokens of the longest prompt.", default=256, ge=1)


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
