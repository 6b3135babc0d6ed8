"""Does SmolLM2-135M-Instruct get better by RL, and do soft thoughts add something to tokens? One command that resumes.

    rl-soft fetch smollm2
    nice python benchmarks/smollm2.py [--seeds 1 2 3] [--arms NAME ...] [--out runs/smollm2_study]

One warm start is shared by all arms: supervised on problems of MAWPS and ASDiv, with their equations as worked steps.
RL is on SVAMP, of which only answers are used; a quarter of its problems, in 19 of its 101 families, is held out
(smollm2_problems.py). An arm is trained for two halves of equally many steps, on problems that nothing before it has
met, with a fresh optimizer; each half has a kind of thought (`ARMS`). Then it is evaluated.

The queue is a list of entries, seed by seed: warm start, halves, evaluations; then the equations that were written,
and the noise of the gradient; then CODI from the same warm start, its twin that writes its steps, and RL from CODI. An
entry is a process of its own, and is done once its small result file is there (OUT/results/ENTRY.json: counts by
problem, figures by step).
Everything may be killed at any time: training goes on from its last checkpoint, an evaluation from its last record.
Two commands on one folder share the work, if they name different seeds. smollm2_report.py makes tables and picture
from the result files alone; docs/results/smollm2 has those of the published run.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import gc
import json
import logging
import random
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from smollm2_equations import equations_of, written
from smollm2_problems import count_alike, download, to_be_asked, to_learn_from
from smollm2_report import ARMS, COUNTS, METRICS, SPLITS, entry_of, last_kinds, report

from rl_soft.config.recipe import load_recipe
from rl_soft.evaluation.records import GREEDY, read
from rl_soft.files import write_atomic

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "smollm2"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What `--size NAME=VALUE` sets."""

    largest: int = 200  # problems with larger numbers, or with numbers that are no integers, are left out
    unseen: int = 200  # problems of an evaluation
    seen: int = 64
    validation: int = 32  # of each
    copies: int = 2  # of a problem of MAWPS or ASDiv, with other numbers
    warm_batch: int = 16
    warm_steps: int = 200
    cool_steps: int = 80  # of the warm start, behind these, while its learning rate falls to zero
    codi_batch: int = 8
    codi_steps: int = 180
    prompts: int = 8
    completions: int = 8
    steps: int = 30  # of one half
    learning_rate: float = 2e-4  # of RL
    samples: int = 16
    thoughts: int = 32  # the most; solutions are shorter
    lora_r: int = 16
    gradient_batches: int = 16


SOFT = {"thought": "gumbel", "thought_k": 4, "thought_tau": 0.5, "ratio": "top1"}
KINDS: dict[str, dict[str, Any]] = {
    "token": {"thought": "token", "ratio": "top1"},
    "soft": SOFT,
    "softer": SOFT | {"thought_k": 8, "thought_tau": 1.0},
}


class Study:
    """The entries, by name.

    Args:
        out: run folders and problems.
        results: small files, one for each entry that is done.
        model: the folder of SmolLM2-135M-Instruct.
        svamp: the folder of its two files; what is missing in it is downloaded.
    """

    def __init__(self, out: Path, results: Path, model: Path, svamp: Path, sizes: Sizes) -> None:
        self.out, self.results, self.model, self.svamp, self.sizes = out, results, model, svamp, sizes
        self.text = {
            "end_of_thinking": "####",
            "num_thoughts": sizes.thoughts,
            "step_separator": "\n",
            "question_template": "{question}\n",
            "max_answer_tokens": 6,
        }

    def entries(self, seeds: list[int], arms: list[str], codi: bool) -> dict[str, Callable[[], dict[str, Any]]]:
        made: dict[str, Callable[[], dict[str, Any]]] = {"warm": self.warm}
        for seed in seeds:
            halves = [ARMS[arm][:half] for half in (1, 2) for arm in arms]  # a first half may be that of two arms
            made |= {entry_of(kinds, seed): partial(self.half, kinds, seed) for kinds in halves}
            made |= {f"warm-{kind}-eval": partial(self.warm_eval, kind) for kind in last_kinds(arms)}
            made |= {f"{entry_of(ARMS[arm], seed)}-eval": partial(self.arm_eval, ARMS[arm], seed) for arm in arms}
        runs = [f"warm-{kind}" for kind in last_kinds(arms)] + [entry_of(ARMS[arm], s) for s in seeds for arm in arms]
        made |= {f"{run}-equations": partial(self.equations, run) for run in runs} | {"gradients": self.gradients}
        return made | ({"codi": self.codi, "cot": self.cot, "codi_rl": self.codi_rl} if codi else {})

    # -- entries ------------------------------------------------------------------------------------------------------

    def warm(self) -> dict[str, Any]:
        """Supervised on worked equations, all weights; then `cool_steps` more, while the rate falls to zero."""
        self.problems()
        sizes, first, run = self.sizes, self.out / "warm_first", self.out / "warm"
        values = self.text | {
            "use_peft": False, "validation_problems": 2 * sizes.validation, "validation_every": 30,
            "stop_at_accuracy": None, "learning_rate": 3e-4, "weight_decay": 0.0, "max_grad_norm": 1.0,
            "warmup_steps": 10, "bf16": True, "attn_implementation": "eager",
        }  # fmt: skip
        constant = {"lr_scheduler_type": "constant_with_warmup", "max_steps": sizes.warm_steps}
        self.supervised("sft_cot", first, values | constant | {"model_name_or_path": str(self.model)})
        falling = {"lr_scheduler_type": "linear", "max_steps": sizes.cool_steps, "seed": 2}
        self.supervised("sft_cot", run, values | falling | {"model_name_or_path": str(first / "model")})
        return {"curve": losses(first), "curve while cooling": losses(run)}

    def warm_eval(self, kind: str) -> dict[str, Any]:
        """The warm start with this kind of thoughts, and how far its texts are those of tokens."""
        found = {"evaluations": {"own": self.evaluated(f"warm-{kind}", self.out / "warm", **self.thought(kind))}}
        return found if kind == "token" else {"agreement": self.agreement("warm-token", f"warm-{kind}"), **found}

    def half(self, kinds: tuple[str, ...], seed: int) -> dict[str, Any]:
        """One half of an arm, by the kinds of thoughts of its halves so far."""
        run, before = (
            self.out / entry_of(kinds, seed),
            self.out / (entry_of(kinds[:-1], seed) if kinds[1:] else "warm"),
        )
        self.reinforced(run, before, self.text | KINDS[kinds[-1]], f"rl{len(kinds)}", seed)
        return {"curve": by_step(run)}

    def arm_eval(self, kinds: tuple[str, ...], seed: int) -> dict[str, Any]:
        """An arm after both halves; one that knows a single kind of thought also with another kind."""
        name, other = entry_of(kinds, seed), "soft" if kinds[-1] == "token" else "token"
        found = {"own": self.evaluated(name, self.out / name)}
        if len(set(kinds)) > 1:
            return {"evaluations": found}
        found[other] = self.evaluated(f"{name}-{other}", self.out / name, **self.thought(other))
        return {"agreement": self.agreement(name, f"{name}-{other}"), "evaluations": found}

    def equations(self, run: str) -> dict[str, Any]:
        """What was written on families that RL did not meet."""
        return written(read(self.out / "evals" / run / "unseen" / "records.jsonl"), equations_of(self.svamp))

    def gradients(self) -> dict[str, Any]:
        """How noisy the gradient of one batch is at the warm start, for soft thoughts and for tokens."""
        from smollm2_gradients import measure

        start, problems = self.out / "warm" / "model", self.out / "problems" / "rl1.jsonl"
        files = {kind: self.out / f"gradients-{kind}.pt" for kind in ("token", "soft")}
        return {kind: measure(start, problems, self.thought(kind), file, self.sizes) for kind, file in files.items()}

    def codi(self) -> dict[str, Any]:
        """Six Gumbel thoughts in the place of the equations, from the warm start."""
        run, latent = self.out / "codi", self.latent() | self.thought("soft") | {"drop_last_step": False}
        self.supervised("codi", run, self.after_warm() | latent)
        return {"curve": losses(run), "evaluations": {"own": self.evaluated("codi", run)}}

    def cot(self) -> dict[str, Any]:
        """The twin of `codi`: as many steps with the same adapter, on the equations."""
        run = self.out / "cot"
        self.supervised("sft_cot", run, self.after_warm() | self.text)
        return {"curve": losses(run), "evaluations": {"own": self.evaluated("cot", run)}}

    def codi_rl(self) -> dict[str, Any]:
        """RL of latent thoughts, from `codi`."""
        latent = self.latent() | {"phase": "latent", "end_of_thinking": ""}
        values = self.text | SOFT | latent | {"lora_r": 128, "lora_alpha": 32}
        run = self.out / "codi_rl"
        self.reinforced(run, self.out / "codi", values, "rl1", 1)
        return {"curve": by_step(run), "evaluations": {"own": self.evaluated("codi_rl", run)}}

    # -- what they are made of ----------------------------------------------------------------------------------------

    def problems(self) -> None:
        """The problem files, made once; no two share a problem."""
        folder, sizes = self.out / "problems", self.sizes
        names = *SPLITS, "warm", "rl1", "rl2"
        if all((folder / f"{name}.jsonl").exists() for name in names) and (self.results / "problems.json").exists():
            return
        download(self.svamp)
        families, half, v = to_be_asked(self.svamp, sizes.largest), sizes.prompts * sizes.steps, sizes.validation
        family_of = {row["id"]: number for number, family in enumerate(families) for row in family}
        files: dict[str, list[dict[str, Any]]] = {"unseen": []}
        while len(files["unseen"]) < sizes.unseen:
            files["unseen"] += families.pop()
        files["unseen"] = files["unseen"][: sizes.unseen]
        others = [row for family in families for row in family]
        random.Random(0).shuffle(others)
        for name, count in {"seen": sizes.seen, "validation": v, "rl1": half, "rl2": half}.items():
            files[name], others = others[:count], others[count:]
        learnt = to_learn_from(self.svamp, sizes.largest, sizes.copies)
        mixed = zip(files.pop("validation"), learnt[:v], strict=True)
        files["warm"] = [row for pair in mixed for row in pair] + learnt[v:]
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in files.items():
            write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        held_out = {split: [row["id"] for row in files[split]] for split in SPLITS}
        related = {f"families of {split}": [family_of[name] for name in held_out[split]] for split in SPLITS}
        counts = {"rows": {name: len(rows) for name, rows in files.items()}}
        counts["like a row of the warm start"] = {split: count_alike(files[split], learnt[v:]) for split in SPLITS}
        self.store("problems", counts | held_out | related)

    def supervised(self, recipe: str, run: Path, values: dict[str, Any]) -> None:
        batch = {
            "dataset": str(self.out / "problems" / "warm.jsonl"), "dataset_options": None, "train_size": None,
            "per_device_train_batch_size": self.sizes.warm_batch, "gradient_accumulation_steps": 1,
            "logging_steps": 10, "save_steps": 40, "save_total_limit": 1, "disable_tqdm": True,
        }  # fmt: skip
        trained(recipe, batch | values | {"output_dir": str(run)})

    def after_warm(self) -> dict[str, Any]:
        """Values of `codi` and its twin."""
        return {
            "model_name_or_path": str(self.out / "warm" / "model"), "max_steps": self.sizes.codi_steps,
            "per_device_train_batch_size": self.sizes.codi_batch,
            "validation_problems": 2 * self.sizes.validation, "validation_every": 100, "max_answer_tokens": 6,
            "question_template": "{question}\n", "learning_rate": 5e-4, "bf16": True, "attn_implementation": "eager",
        }  # fmt: skip

    def latent(self) -> dict[str, Any]:
        """Of both entries with latent thoughts; answers stand behind the words that the warm start has learnt."""
        return {"num_thoughts": 6, "answer_prompt": self.text["end_of_thinking"]}

    def reinforced(self, run: Path, start: Path, values: dict[str, Any], problems: str, seed: int) -> None:
        sizes = self.sizes
        common = {
            "model_name_or_path": str(start / "model"), "lora_r": sizes.lora_r, "lora_alpha": 2 * sizes.lora_r,
            "dataset": str(self.out / "problems" / f"{problems}.jsonl"), "train_size": None, "seed": seed,
            "thought_temperature": 1.0, "temperature": 1.0, "rewards": ["math_accuracy"], "reward_weights": None,
            "prompts_per_step": sizes.prompts, "num_generations": sizes.completions, "max_steps": sizes.steps,
            "per_device_train_batch_size": sizes.prompts * sizes.completions // 2, "save_steps": 5,
            "learning_rate": sizes.learning_rate, "filter_groups": "accuracy", "resample": True, "max_resamples": 2,
            "save_total_limit": 1, "log_completions": False, "disable_tqdm": True,
        }  # fmt: skip
        trained("grpo_gumbel", common | values | {"output_dir": str(run)})

    def thought(self, kind: str) -> dict[str, Any]:
        return {key: value for key, value in KINDS[kind].items() if key != "ratio"}

    def evaluated(self, name: str, run: Path, **thinking: Any) -> dict[str, Any]:
        """Counts of right answers by problem, of the samples and of the greedy one."""
        from rl_soft.cli.eval import run as evaluate

        found: dict[str, Any] = {"samples": self.sizes.samples}
        positions = []
        for split in SPLITS:
            folder = self.out / "evals" / name / split
            asked = {"dataset": str(self.out / "problems" / f"{split}.jsonl"), "output_dir": str(folder)}
            asked |= {"eval_samples": self.sizes.samples, "eval_batch_size": 20 * self.sizes.samples}
            evaluate(str(run / "model"), asked | thinking)
            correct: dict[str, list[int]] = defaultdict(lambda: [0, 0])  # of the samples, of the greedy answer
            for r in read(folder / "records.jsonl"):
                correct[r["problem_id"]][r["sample"] == GREEDY] += r["outcome"] == "correct"
                positions += [r["thoughts"] + r["answer_tokens"]] * (r["sample"] != GREEDY)
            rows = [json.loads(line) for line in (self.out / "problems" / f"{split}.jsonl").read_text().splitlines()]
            assert correct.keys() == {f"{split}/{row['id']}" for row in rows}
            counts = [correct[f"{split}/{row['id']}"] for row in rows]
            found[split] = dict(zip(COUNTS, map(list, zip(*counts, strict=True)), strict=True))
        return found | {"positions": sum(positions) / len(positions)}

    def agreement(self, one: str, other: str) -> dict[str, float]:
        """Of two evaluations of one model, drawn with one noise: how much of the sampled text is the same.

        A soft thought's strongest id is the token that the same noise draws, until what was fed before makes a
        difference.
        """
        same, shared, n = 0, 0.0, 0
        for split in SPLITS:
            ours, theirs = (texts(self.out / "evals" / name / split) for name in (one, other))
            for a, b in ((text, theirs[key]) for key, text in ours.items()):
                common = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                same, shared, n = same + (a == b), shared + common / max(len(a), len(b), 1), n + 1
        return {"same text": same / n, "share of the text before they part": shared / n, "completions": n}

    # -- the queue ----------------------------------------------------------------------------------------------------

    def store(self, name: str, values: dict[str, Any]) -> None:
        self.results.mkdir(parents=True, exist_ok=True)
        write_atomic(self.results / f"{name}.json", json.dumps(rounded(values)) + "\n")

    def check_sizes(self) -> None:
        """Results and runs of other sizes are not mixed with these."""
        sizes = rounded(dataclasses.asdict(self.sizes))
        for folder, option in ((self.results, "--results"), (self.out, "--out")):
            file = folder / "sizes.json"
            stored = json.loads(file.read_text()) if file.exists() else sizes
            if different := [name for name in {**sizes, **stored} if sizes.get(name) != stored.get(name)]:
                old, new = (of.get(different[0]) for of in (stored, sizes))
                raise SystemExit(f"{folder} was made with {different[0]} = {old}, not {new}; choose another {option}")
        for folder in (self.results, self.out):
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / "sizes.json", json.dumps(sizes) + "\n")
        if (self.results / "warm.json").exists() and not (self.out / "warm" / "model").exists():
            raise SystemExit(
                f"the runs of {self.results} are not in {self.out}; leave --results out to make them again, "
                "or see their tables: python benchmarks/smollm2_report.py"
            )


def trained(recipe: str, values: dict[str, Any]) -> None:
    """Run a recipe, or what is left of it; a run before it in this process leaves nothing behind."""
    from accelerate.state import AcceleratorState

    from rl_soft import run

    if not (Path(values["output_dir"]) / "model").exists():
        run(load_recipe(RECIPES / f"{recipe}.yaml", {"eval_problems": 0, **values}))
        gc.collect()
        AcceleratorState._reset_state()
        if not (Path(values["output_dir"]) / "model").exists():
            raise SystemExit("stopped with a checkpoint; the same command goes on")  # half a run is no result


def by_step(run: Path) -> dict[str, list[float]]:
    """Figures of every step; after a resume the last line of a step counts."""
    lines = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if "reward" in line:
            lines[line["step"]] = line
    return {ours: [line[name] for _, line in sorted(lines.items())] for ours, name in METRICS.items()}


def losses(run: Path) -> dict[str, list[float]]:
    lines = {x["step"]: x for x in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in x}
    return {name: [line[name] for _, line in sorted(lines.items())] for name in ("step", "loss")}


def texts(evaluation: Path) -> dict[tuple[str, int], str]:
    rows = read(evaluation / "records.jsonl")
    return {(r["problem_id"], r["sample"]): r["text"] for r in rows if r["sample"] != GREEDY}


def rounded(value: Any) -> Any:
    """Five significant digits are enough for a figure by step, and keep the files small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    return [rounded(x) for x in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="NAME")
    parser.add_argument("--no-codi", action="store_true", help="without the three entries of CODI")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "smollm2_study", help="run folders")
    parser.add_argument("--results", type=Path, help="result files; results in --out, where it is not given")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--svamp", type=Path, default=ROOT / "models" / "svamp", help="its two files; else downloaded")
    parser.add_argument("--size", nargs="*", default=[], metavar="NAME=VALUE", help="; ".join(map(str, vars(Sizes()))))
    parser.add_argument("--entry", help="this one alone, in this process")
    args = parser.parse_args()
    sizes = Sizes(**{name: json.loads(value) for name, value in (word.split("=") for word in args.size)})
    results = args.results or args.out / "results"
    study = Study(args.out.resolve(), results.resolve(), args.model.resolve(), args.svamp.resolve(), sizes)
    entries = study.entries(args.seeds, args.arms, not args.no_codi)
    study.check_sizes()
    if args.entry:
        logging.basicConfig(format="[rl_soft] %(message)s", level=logging.WARNING)
        logging.getLogger("rl_soft").setLevel(logging.INFO)
        study.store(args.entry, entries[args.entry]())
        return
    for name in entries:
        if (study.results / f"{name}.json").exists():
            continue
        log = study.out / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        # The process keeps the lock: where this one was killed and that one was not, the next command waits for it.
        with (study.out / f"{name}.lock").open("w") as lock, log.open("a") as file:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (study.results / f"{name}.json").exists():
                continue
            print(f"{name}: {log}", flush=True)
            command = [sys.executable, *sys.argv, "--entry", name]
            code = subprocess.run(command, stdout=file, stderr=file, pass_fds=[lock.fileno()]).returncode
        if code:
            raise SystemExit(f"{name} ended with exit code {code}, see {log}; the same command goes on")
    report(study.results)


if __name__ == "__main__":
    main()
