"""The keys of commands on a model, and of `rl-soft estimate`; as in `arguments`."""

from __future__ import annotations

from typing import Annotated, Any

from rl_soft.config.arguments import SourceArguments, WeightArguments, possible_k
from rl_soft.keys import Number, OneOf, either, key, keys, nearest
from rl_soft.thoughts.kinds import ENGINES, KINDS
from rl_soft.thoughts.thinking import CONTROLS

ANALYSES = ("probe", "cost", "traces", "branching", "lens", "plane", "all")  # kinds of `rl-soft analyze`
MAX_SHOWN = 10  # entries of a thought that `rl-soft generate` can show


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
