"""A recipe in the words of TRL's and open-r1's scripts, read as ours: `read_theirs` says what each key became.

    renamed      torch_dtype -> dtype, dataset_name -> dataset, reward_funcs -> rewards, ... (`elsewhere.CALLED`)
    batch sizes  per_device_train_batch_size x processes x steps_per_generation completions make a rollout
    lengths      max_completion_length = num_thoughts + max_answer_tokens: what is sampled; what is fed is not counted
    ignored      keys that change nothing here, each with its reason (`elsewhere.IGNORED`)
    defaults     those of TRL, where a recipe is TRL's own and says nothing else

A key of theirs beside ours with another value is an error that shows both.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rl_soft.config.elsewhere import ABSENT, CALLED, IGNORED
from rl_soft.config.their_defaults import defaults_of
from rl_soft.config.their_rewards import PARAMETERS, read_rewards
from rl_soft.config.trainers import trainer_fields
from rl_soft.keys import Gathered
from rl_soft.thoughts.kinds import RL as RL_METHODS

SHORTEST_ANSWER, LONGEST_ANSWER = 16, 512  # of a max_completion_length that nobody has divided
BATCHES = ("generation_batch_size", "steps_per_generation", "gradient_accumulation_steps")
BEATS = {  # key of the command line -> keys of a file that say a part of it
    "prompts_per_step": BATCHES,
    "dataset_options": ("dataset_config", "dataset_train_split", "dataset_test_split"),
    "dataset_columns": ("dataset_prompt_column",),
    "warmup_steps": ("warmup_ratio",),
    "max_completion_length": ("num_thoughts", "max_answer_tokens"),
    "generation_batch_size": ("steps_per_generation", "prompts_per_step"),
    "steps_per_generation": ("generation_batch_size", "prompts_per_step"),
    "gradient_accumulation_steps": ("prompts_per_step",),
}


@dataclass(frozen=True)
class Note:
    """What became of keys of theirs.

    Attributes:
        kind: renamed, derived, ignored or default.
        keys: of the recipe; none for a default.
        made: key of ours -> value.
        why: the rule, in words.
    """

    kind: str
    keys: tuple[str, ...] = ()
    made: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        made = ", ".join(f"{key} {value!r:.120}" for key, value in self.made.items())
        told = " ".join(part for part in (", ".join(self.keys), f"-> {made}" if made and self.keys else made) if part)
        return f"{told} ({self.why})" if self.why else told


def world_size() -> int:
    """Processes that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_theirs(values: Mapping[str, Any]) -> bool:
    """Whether a recipe is one of TRL's scripts: it names data or rewards as they do, and nothing that only we have."""
    return any(values.get(key) for key in ("dataset_name", "reward_funcs")) and not any(
        values.get(key) for key in ("phase", "warm_start", "model_config")
    )


def over(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A file's values under those of the command line, which beat what says the same by another name."""
    beaten = {key for key in values if CALLED.get(key, key) in {CALLED.get(name, name) for name in overrides}}
    for name in overrides:
        beaten |= set(BEATS.get(name, ()))
    if {"num_thoughts", "max_answer_tokens"} <= overrides.keys():
        beaten.add("max_completion_length")
    return {key: value for key, value in values.items() if key not in beaten} | dict(overrides)


def method_of(values: Mapping[str, Any], theirs: bool) -> str:
    """The method that a recipe names; grpo, where one of TRL's scripts names a thought and no method."""
    named = values.get("method")
    return "grpo" if named is None and theirs and values.get("thought") else str(named)


def read_theirs(
    values: Mapping[str, Any],
    known: Collection[str],
    method: str,
    processes: int | None = None,
    theirs: bool = False,
) -> tuple[dict[str, Any], list[Note], list[str]]:
    """A recipe's values by the names of our keys, what was done, and what could not be: a line for each pair of keys
    that say different things, each batch that does not divide, and each reward that there is nothing like.

    Args:
        values: as they stand in the file, with what the command line changed.
        known: the keys of the method.
        processes: on which batch sizes per device depend; those of the launcher if absent.
        theirs: whether the recipe is one of TRL's scripts, so that TRL's defaults hold.
    """
    reading = _Reading(dict(values), known, method, processes or world_size(), theirs)
    for step in (
        reading.rename,
        reading.data,
        reading.model,
        reading.ignore,
        *((reading.rewards, reading.defaults, reading.lengths, reading.batches) if method in RL_METHODS else ()),
    ):
        with reading.mistakes:
            step()
    return reading.values, reading.notes, reading.mistakes.lines


def renamed(values: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
    """Values of a command by the names of our keys. Raises Mistakes for a pair of names with different values."""
    reading = _Reading(dict(values), known, "", 1, False)
    reading.rename()
    reading.data()
    reading.mistakes.tell()
    return reading.values


def told(notes: list[Note]) -> Iterator[str]:
    """What a run says of its notes, a line for each kind of them."""
    renamed = [str(note) for note in notes if note.kind == "renamed"]
    if renamed:
        yield f"read as: {'; '.join(renamed)}"
    yield from (str(note) for note in notes if note.kind == "derived")
    ignored = [str(note) for note in notes if note.kind == "ignored"]
    if ignored:
        yield f"of no effect here: {'; '.join(ignored)}"
    defaults = [str(note) for note in notes if note.kind == "default"]
    if defaults:
        yield f"not given, so: {'; '.join(defaults)}"


class _Reading:
    def __init__(
        self, values: dict[str, Any], known: Collection[str], method: str, processes: int, theirs: bool
    ) -> None:
        self.values, self.known, self.method, self.processes, self.theirs = values, known, method, processes, theirs
        self.notes: list[Note] = []
        self.mistakes = Gathered()

    # -- words ----------------------------------------------------------------------------------------------------

    def set(self, kind: str, keys: tuple[str, ...], made: dict[str, Any], why: str = "") -> None:
        """Values of ours in the place of keys of theirs; one that is given beside them must be the same."""
        shown = ", ".join(f"{key} {self.values[key]!r}" for key in keys)
        for key in keys:
            self.values.pop(key, None)
        for key, value in made.items():
            given = self.values.get(key)
            if given is not None and given != value:
                self.mistakes.lines.append(
                    f"{shown} makes {key} {value!r}, and {key} is {given!r}; give one of them"
                    if key not in CALLED.values() or len(keys) > 1
                    else f"{shown} and {key} {given!r} are one key, called {key} here; give one of them"
                )
            self.values[key] = value
        self.notes.append(Note(kind, keys, made, why))

    def given(self, *keys: str) -> tuple[str, ...]:
        for key in keys:
            if key in self.values and self.values[key] is None and key not in self.known:
                del self.values[key]
        return tuple(key for key in keys if self.values.get(key) is not None)

    # -- steps ----------------------------------------------------------------------------------------------------

    def rename(self) -> None:
        if isinstance(self.values.get("model_init_kwargs"), dict) and "model_init_kwargs" in self.known:
            inside = dict(self.values["model_init_kwargs"])
            names = {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn_implementation"}
            names["revision"] = "model_revision"
            made = {names[key]: inside.pop(key) for key in list(inside) if key in names}
            if made and not inside:
                self.set("renamed", ("model_init_kwargs",), made)
        for key in self.given(*CALLED):
            ours = CALLED[key]
            if ours in self.known and not (ours == "rewards" and self.method in RL_METHODS):
                self.set("renamed", (key,), {ours: self.values[key]})
        for key in [key for key, value in self.values.items() if key in ABSENT and not value]:
            del self.values[key]  # switched off, as it is here

    def data(self) -> None:
        if "dataset_options" not in self.known:
            return
        for key, option, usual in (
            ("dataset_config", "config", None),
            ("dataset_train_split", "train_split", "train"),
            ("dataset_test_split", "evaluation_split", "test"),
        ):
            for _ in self.given(key):
                value = self.values[key]
                self._inside(key, "dataset_options", {} if value == usual else {option: value})
        for key in self.given("dataset_prompt_column"):
            self._inside(key, "dataset_columns", {"question": self.values[key]})

    def _inside(self, key: str, ours: str, made: dict[str, Any]) -> None:
        """A part of a mapping of ours."""
        whole = self.values.get(ours)
        whole = dict(whole) if isinstance(whole, dict) else {}
        for name, value in made.items():
            if whole.get(name, value) != value:
                self.mistakes.lines.append(
                    f"{key} {value!r} and {name} {whole[name]!r} of {ours} are one thing; give one of them"
                )
        if made:
            self.values.pop(key)
            self.values[ours] = whole | made
            self.notes.append(Note("renamed", (key,), {ours: whole | made}))
        else:
            self.notes.append(Note("ignored", (key,), {}, f"{self.values.pop(key)} is taken anyway"))

    def model(self) -> None:
        dtype = self.values.get("dtype")
        if isinstance(dtype, str) and (plain := dtype.removeprefix("torch.")) != dtype:
            self.values["dtype"] = plain
        if dtype == "auto":
            self.values["dtype"] = None
            self.notes.append(Note("renamed", ("dtype",), {"dtype": None}, "auto: bfloat16 on a GPU that has it"))
        if self.method in RL_METHODS and isinstance(scale := self.values.get("scale_rewards"), bool):
            self.values["scale_rewards"] = "group" if scale else "none"  # as TRL reads it
        for _ in self.given("warmup_ratio"):
            ratio = self.values.pop("warmup_ratio")
            if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < 1:
                raise ValueError(f"warmup_ratio must be a number, at least 0 and below 1, got {ratio!r}")
            self.values["warmup_ratio"] = ratio
            self.set("renamed", ("warmup_ratio",), {"warmup_steps": ratio}, "a share of all steps")
        for _ in self.given("num_processes"):
            wanted = self.values.pop("num_processes")
            if wanted != self.processes:
                raise ValueError(
                    f"num_processes is {wanted!r}, and {self.processes} run; start it with ./launch.sh RECIPE "
                    f"--nproc {wanted}"
                )

    def ignore(self) -> None:
        for key in self.given(*IGNORED):
            self.values.pop(key)
            self.notes.append(Note("ignored", (key,), {}, IGNORED[key]))
        if self.method in RL_METHODS and self.values.get("use_liger_kernel"):
            del self.values["use_liger_kernel"]
            why = "the density runs through this package's own chunked head"
            self.notes.append(Note("ignored", ("use_liger_kernel",), {}, why))

    def rewards(self) -> None:
        named = self.given("reward_funcs", "reward_functions")
        parameters = {key: self.values[key] for key in self.given(*PARAMETERS)}
        if named:
            try:
                made = read_rewards(self.values[named[0]], parameters)
            except ValueError:
                for key in (*named, *parameters, *self.given("reward_weights")):  # told once
                    del self.values[key]
                raise
            self.set("renamed", (*named, *parameters), {"rewards": made})
        else:
            for key in parameters:
                self.values.pop(key)
                self.notes.append(Note("ignored", (key,), {}, "no reward takes it"))

    def defaults(self) -> None:
        """TRL's, and what soft thoughts need beside them, for a recipe of TRL's scripts."""
        for made, why in defaults_of(self.values, self.method) if self.theirs else ():
            new = {
                key: value
                for key, value in made.items()
                if key in self.known and (isinstance(value, dict) or self.values.get(key) is None)
            }
            if new:
                self.values |= new
                self.notes.append(Note("default", (), new, why))

    def lengths(self) -> None:
        """max_completion_length counts what is sampled: thoughts and answer. What is fed between them is not."""
        if self.values.get("max_completion_length") is None:
            self.values.pop("max_completion_length", None)
        else:
            whole = self.values["max_completion_length"]
            _whole(self.values, "max_completion_length")
            thoughts, answer = self.values.get("num_thoughts"), self.values.get("max_answer_tokens")
            if not all(isinstance(n, int | None) for n in (thoughts, answer)):
                return  # told where their types are checked
            if thoughts is None and self.values.get("phase", "latent") == "latent":
                thoughts = 6  # exact there, and its default
            if answer is None:
                answer = answer_share(whole) if thoughts is None else whole - thoughts
            if thoughts is None:
                thoughts = whole - answer
            if thoughts + answer != whole:
                raise ValueError(
                    f"max_completion_length {whole} is not num_thoughts {thoughts} + max_answer_tokens {answer}; give "
                    "two of the three"
                )
            if thoughts < 1 or answer < 1:
                raise ValueError(
                    f"max_completion_length {whole} leaves num_thoughts {thoughts} and max_answer_tokens {answer}; "
                    "it must be larger, or the one that is given smaller"
                )
            made = {"num_thoughts": thoughts, "max_answer_tokens": answer}
            self.set("derived", ("max_completion_length",), made, "the two are what is sampled")

    def batches(self) -> None:
        """TRL's: B completions on each of W processes, S times, are a rollout of N = B W S; A of the S make a step."""
        named = self.given(*BATCHES)
        for key in set(BATCHES) - set(named):
            self.values.pop(key, None)  # null
        if not named:
            return
        if {"generation_batch_size", "steps_per_generation"} <= set(named):
            shown = " and ".join(f"{key} {self.values[key]!r}" for key in BATCHES[:2])
            raise ValueError(f"{shown} say the same; give one of them")
        for key in (*named, "per_device_train_batch_size", "num_generations"):
            if self.values.get(key) is not None:
                _whole(self.values, key)
        usual = trainer_fields(self.method)
        of = {key: self.values.get(key) or usual[key] for key in ("per_device_train_batch_size", "num_generations")}
        B, G = of.values()
        W, A = self.processes, self.values.get("gradient_accumulation_steps") or 1
        N, S = self.values.get("generation_batch_size"), self.values.get("steps_per_generation") or A
        N = N or B * W * S
        if N % (B * W):
            raise ValueError(
                f"generation_batch_size {N} must be a multiple of per_device_train_batch_size {B} x {W} processes"
            )
        S = N // (B * W)
        if A % S == 0:  # TRL draws anew between two steps, by one policy: all of it is one rollout
            N, S = B * W * A, A
        shown = ", ".join(f"{key} {self.values[key]}" for key in named)
        if N % G:
            near = next(n for n in range(1, G + 1) if N * n % G == 0)
            raise ValueError(
                f"{shown} and per_device_train_batch_size {B} make a rollout of {N} completions on {W} process(es), "
                f"and num_generations {G} does not divide it; {near * W} processes would do (./launch.sh RECIPE "
                f"--nproc {near * W}), or set prompts_per_step"
            )
        if S % A:
            raise ValueError(
                f"{shown}: a rollout of {S} passes does not divide into steps of gradient_accumulation_steps {A}; "
                "give a divisor"
            )
        made = {"prompts_per_step": N // G, "updates_per_rollout": S // A}
        why = f"{N} completions of a rollout, {W} process(es) x {S} passes of {B}, num_generations {G}"
        self.set("derived", named, made, why)


def answer_share(whole: int) -> int:
    """Answer tokens of a max_completion_length: an eighth of it, within bounds."""
    return min(max(whole // 8, SHORTEST_ANSWER), LONGEST_ANSWER, max(whole // 2, 1))


def _whole(values: dict[str, Any], key: str) -> None:
    """Raises ValueError for a value that is no number of things, and takes it out: it is told once."""
    if type(values[key]) is not int or values[key] < 1:
        raise ValueError(f"{key} must be a whole number, at least 1, got {values.pop(key)!r}")
