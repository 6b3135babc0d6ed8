"""Generated, stored and catalogued rows; no network."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rewards.scorers import UNSCORED
from rl_soft.data.equations import equations, holds
from rl_soft.data.sources import Row, assert_disjoint, load_rows, question_hash
from rl_soft.data.stored import CATALOGUE

SMALL = {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1, "compact": True}


def total(expression: str) -> int:
    """Of a compact chain such as `4+-3--2`."""
    tokens = re.findall(r"(?:^-?|(?<=\d)[+-]-?)\d+", expression)
    return sum(int(token.replace("--", "+").replace("+-", "-")) for token in tokens)


def write(path: Path, records: list[dict[str, Any]]) -> str:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(records), path)
    return str(path)


# Generated


def test_question_hash_ignores_case_and_space() -> None:
    assert question_hash("What  is\n2 + 2?") == question_hash(" what is 2 + 2? ")
    assert question_hash("2 + 2") != question_hash("2 + 3")
    assert len(question_hash("")) == 16


@pytest.mark.parametrize("negation", [False, True])
def test_chain_sum_steps_lead_to_the_answer(negation: bool) -> None:
    for row in load_rows("chain_sum", "train", 200, options={**SMALL, "max_terms": 5, "allow_negation": negation}):
        assert row.question.endswith("=")
        assert " " not in row.question + "".join(row.steps)
        assert total(row.question[:-1]) == int(row.answer)
        result = re.match(r"-?\d+", row.question)[0]
        for step in row.steps:
            left, right = step.split("=")
            assert left.startswith(result)
            assert total(left) == int(right)
            result = right
        assert result == row.answer


def test_chain_sum_in_words() -> None:
    row = load_rows("chain_sum", "train", 1)[0]
    assert row.question.startswith("State the final answer to the following arithmetic problem: ")
    assert row.steps[-1].endswith(f" = {row.answer}")
    assert (row.answer_type, row.source, row.family) == ("number", "chain_sum", None)


def test_sides_never_overlap_whatever_the_seeds() -> None:
    for seed in range(3):
        train = load_rows("chain_sum", "train", 500, seed, SMALL)
        assert_disjoint(train, load_rows("chain_sum", "evaluation", 100, 2 - seed, SMALL))
        assert len({row.id for row in train}) == len({question_hash(row.question) for row in train}) == 500


def test_generation_is_a_function_of_its_arguments() -> None:
    rows = load_rows("gsm_symbolic", "train", 60, seed=5)
    assert rows == load_rows("gsm_symbolic", "train", 60, seed=5)
    assert rows[:20] == load_rows("gsm_symbolic", "train", 20, seed=5)
    assert not {row.id for row in rows} & {row.id for row in load_rows("gsm_symbolic", "train", 60, seed=6)}


def test_neighbouring_seeds_give_other_rows() -> None:
    first, second = (load_rows("chain_sum", "train", 100, seed) for seed in (0, 1))
    assert not {row.id for row in first} & {row.id for row in second}


def test_exhausted_space_says_how_many_rows_it_has() -> None:
    options = {**SMALL, "min_terms": 2, "max_terms": 2}  # 200 questions in all
    with pytest.raises(ValueError, match=r"distinct evaluation questions, fewer than 200") as error:
        load_rows("chain_sum", "evaluation", 200, options=options)
    count = int(re.search(r"has (\d+) distinct", str(error.value))[1])
    assert 5 <= count <= 40
    evaluation = load_rows("chain_sum", "evaluation", count, options=options)
    assert_disjoint(load_rows("chain_sum", "train", 200 - count, options=options), evaluation)


def test_gsm_symbolic_in_words() -> None:
    rows = load_rows("gsm_symbolic", "train", 200)
    assert all(row.steps and row.family for row in rows)
    assert not any(step.startswith("####") for row in rows for step in row.steps)
    assert all(row.question.endswith("Do not include units.") for row in rows)
    assert len({row.family for row in rows}) > 50


@pytest.mark.parametrize("terms", [2, 3, 5])
def test_chains_modulo_ten_hold_and_end_in_the_answer(terms: int) -> None:
    train = load_rows("chain_mod", "train", 100, seed=1, options={"terms": terms})
    evaluation = load_rows("chain_mod", "evaluation", 20, seed=2, options={"terms": terms})
    assert_disjoint(train, evaluation)
    for row in train + evaluation:
        first, *others = (step.partition("=") for step in row.steps)
        assert len(row.steps) == terms - 1 and row.question.startswith(first[0])
        for left, _, right in (first, *others):
            assert eval(left) % 10 == int(right)
        lefts = [left for left, _, _ in others]
        assert [left[0] for left in lefts] == [right for _, _, right in (first, *others)][:-1]
        assert row.question == first[0] + "".join(left[1:] for left in lefts) + "="
        assert row.answer == row.steps[-1].partition("=")[2]
    with pytest.raises(ValueError, match=r"chain_mod refuses the options .*'length': 3.*it has terms"):
        load_rows("chain_mod", "train", 5, options={"length": 3})
    with pytest.raises(ValueError, match="fewer than 200"):
        load_rows("chain_mod", "evaluation", 200, options={"terms": 2})


def test_gsm_symbolic_as_equations() -> None:
    for row in load_rows("gsm_symbolic", "evaluation", 200, options={"steps": "equations", "compact": True}):
        assert "final answer" not in row.question
        assert all(holds(step) for step in row.steps)
        assert float(row.steps[-1].rpartition("=")[2]) == float(row.answer)


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("He works 6 days/week * 2 weeks/month = 12 days/month", ("6*2=12",)),
        ("So 12 months x £10 = £120 and 7-9 = -2.", ("12*10=120", "7-9=-2")),
        ("She earns $185/day * 25 days/month = $4,625/month", ("185*25=4625",)),
        ("85 spools / 250 spools * 100% = 34%", ("85/250*100=34",)),
        ("$220 * 40% = $88", ("220*(40/100)=88",)),
        ("The perimeter is 2(62+18) = 160", ("2*(62+18)=160",)),
        ("He writes 4784/60=79 hours", ()),  # does not hold
        ("We know that y = x + 70, and y + x = 272", ()),
        ("4/0 = 3, ((((1+1=2", ()),
    ],
)
def test_equations(sentence: str, expected: tuple[str, ...]) -> None:
    assert equations(sentence) == expected


def score(answer: str, row: Row) -> float:
    """By the task's own scorer, from what the row holds."""
    from reasoning_gym import get_score_answer_fn

    entry = {"question": row.question, "answer": row.answer, "metadata": json.loads(row.metadata)}
    return get_score_answer_fn(row.source)(answer, entry)


def test_any_task_with_its_own_scorer() -> None:
    for row in load_rows("countdown", "train", 5):
        assert (row.answer_type, row.steps) == ("free", ())
        assert score(row.answer, row) == 1.0
        assert score("1 + 1", row) < 1.0


@pytest.mark.slow
def test_scorers_accept_the_rows_of_every_task() -> None:
    from reasoning_gym.factory import DATASETS

    for task in sorted(set(DATASETS) - {"composite", "knight_swap", *UNSCORED}):
        for row in load_rows(task, "train", 3):
            assert not (row.answer and row.metadata) or score(row.answer, row) == 1.0, task


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "gsm8kk"}, "unknown data source 'gsm8kk'; did you mean gsm8k"),
        ({"source": "chain_sums"}, "did you mean chain_sum"),
        ({"size": None}, "chain_sum is generated: size .* must say how many rows"),
        ({"size": 0}, "size must be at least 1, not 0"),
        ({"split": "test"}, "split must be one of train, evaluation, not 'test'"),
        ({"options": {"terms": 3}}, "unexpected keyword argument 'terms'; it has min_terms, .*compact"),
        ({"options": {"min_terms": 5, "max_terms": 3}}, "max_terms must be >= min_terms"),
        ({"columns": {"question": "q"}}, "columns are for stored rows"),
        ({"source": "gsm_symbolic", "options": {"steps": "none"}}, "steps must be one of text, equations, not 'none'"),
    ],
)
def test_generated_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(**{"source": "chain_sum", "split": "train", "size": 3, **arguments})


def test_overlap_names_the_question() -> None:
    def row(key: str, question: str) -> Row:
        return Row(key, question, (), "1", "number", "s", None)

    assert_disjoint([row("a", "x y")], [row("b", "x z")])
    with pytest.raises(ValueError, match="b = a: 'X  y'"):
        assert_disjoint([row("a", "x y")], [row("b", "X  y")])


# Files

RECORDS: list[dict[str, Any]] = [
    {"question": "2+2?", "answer": "4", "solution": "Add.\n2+2=4\n#### 4", "family": "sum"},
    {"question": "10-12.5?", "answer": "-2.50", "solution": "", "family": ""},
    {"question": "Colour of the sky?", "answer": "blue", "solution": "Look up.", "family": "colour"},
]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"mine{suffix}", RECORDS)
    first, second, third = load_rows(path, "train")
    assert first == Row("mine/0", "2+2?", ("Add.", "2+2=4"), "4", "number", path, "sum")
    assert (second.answer, second.answer_type, second.steps, second.family) == ("-2.5", "number", (), None)
    assert (third.answer, third.answer_type) == ("blue", "free")


def test_columns_are_mapped(tmp_path: Path) -> None:
    record = {"q": "2+2?", "gold": 4, "work": ["2+2", "=4"], "key": "first", "kind": "number", "template": 7}
    path = write(tmp_path / "mine.jsonl", [record])
    names = {
        "question": "q",
        "answer": "gold",
        "steps": "work",
        "id": "key",
        "answer_type": "kind",
        "family": "template",
    }
    assert load_rows(path, "train", columns=names) == [
        Row("mine/first", "2+2?", ("2+2", "=4"), "4", "number", path, "7"),
    ]
    with pytest.raises(ValueError, match=r"mine.jsonl has no column 'question'; it has q, gold, work"):
        load_rows(path, "train")
    with pytest.raises(ValueError, match="no column 'proof'"):
        load_rows(path, "train", columns={**names, "steps": "proof"})
    with pytest.raises(ValueError, match=r"columns must be one of question, .*, not 'prompt'"):
        load_rows(path, "train", columns={"prompt": "q"})


def test_a_smaller_draw_is_part_of_a_larger(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": i} for i in range(50)])
    assert [row.answer for row in load_rows(path, "train")] == [str(i) for i in range(50)]
    assert (
        load_rows(path, "train", 5, seed=1)
        == load_rows(path, "train", 20, seed=1)[:5]
        != load_rows(path, "train", 5, seed=2)
    )
    with pytest.raises(ValueError, match=r"size is 51, and .*mine.jsonl \(train\) has 50 rows"):
        load_rows(path, "train", 51)


def test_holdout_divides_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", [{"question": f"{i}?", "answer": i} for i in range(200)])
    train, evaluation = (load_rows(path, split, options={"holdout": True}) for split in ("train", "evaluation"))
    assert_disjoint(train, evaluation)
    assert len(train) + len(evaluation) == 200
    assert 5 < len(evaluation) < 40
    with pytest.raises(ValueError, match="200 evaluation questions are also training questions"):
        assert_disjoint(load_rows(path, "train"), load_rows(path, "evaluation"))


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"question": "a", "answer": "1"}, {"question": "b", "answer": " "}], {}, "mine.jsonl, row 2: no answer"),
        ([{"question": "a", "answer": "1"}, {"question": "b"}], {}, "row 2: no answer"),
        ([{"question": "", "answer": "1"}], {}, "row 1: no question"),
        ([{"question": "half \ud83d", "answer": "1"}], {}, "row 1: question: .* at 5 is no Unicode character"),
        ([{"question": "a", "answer": "x"}], {"answer_type": "number"}, "row 1: the answer 'x' is not a number"),
        ([{"question": "a", "answer": "1e99999"}], {"answer_type": "number"}, "is not a number"),
        ([{"question": "a", "answer": "maybe"}], {"answer_type": "bool"}, "the answer 'maybe' is not a bool"),
        ([{"question": "a", "answer": "1", "answer_type": "int"}], {}, "row 1: answer_type must be one of number"),
        ([{"question": "a", "answer": "1"}], {"answer_type": "int"}, "answer_type must be one of number"),
        ([{"question": "a", "answer": "1", "id": 3}] * 2, {}, "row 2: the id 'mine/3' is not unique"),
        ([{"question": "a", "answer": "1"}], {"shuffle": True}, "has no option 'shuffle'"),
        ([], {}, "has no rows"),
    ],
)
def test_file_refusals(tmp_path: Path, records: list[dict], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rows(write(tmp_path / "mine.jsonl", records), "train", options=options)


def test_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        load_rows(str(tmp_path / "none.csv"), "train")
    (tmp_path / "bad.jsonl").write_text('{"question": "a", "answer": 1}\n{"question":\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2 is not JSON"):
        load_rows(str(tmp_path / "bad.jsonl"), "train")
    (tmp_path / "bad.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="must hold a list"):
        load_rows(str(tmp_path / "bad.json"), "train")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="row 1 is not an object"):
        load_rows(str(tmp_path / "list.json"), "train")


# The catalogue, on rows with the true names of the fields

GSM8K = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many altogether?",
    "answer": "She sold 48/2 = <<48/2=24>>24 clips in May.\nAltogether 48+24 = <<48+24=72>>72.\n#### 1,072",
}
GPQA = {
    "Question": "Which is a metal?",
    "Correct Answer": "iron\n",
    "Incorrect Answer 1": "neon",
    "Incorrect Answer 2": "argon",
    "Incorrect Answer 3": "xenon",
}


@pytest.mark.parametrize(
    ("name", "record", "steps", "answer", "answer_type"),
    [
        (
            "gsm8k",
            GSM8K,
            ("She sold 48/2 = 24 clips in May.", "Altogether 48+24 = 72."),
            "1072",
            "number",
        ),
        (
            "gsm8k-aug",
            {"question": "q", "cot": "<<600*30/100=180>> <<180-200=-20>>", "answer": "-20"},
            ("<<600*30/100=180>>", "<<180-200=-20>>"),
            "-20",
            "number",
        ),
        (
            "gsm8k-aug-nl",
            {"question": "q", "cot": "He pays $1.50 * 3 = $4.50. The rest is 0.5.", "answer": "#### 0.50"},
            ("He pays $1.50 * 3 = $4.50.", "The rest is 0.5."),
            "0.5",
            "number",
        ),
        (
            "commonsenseqa-cot",
            {"question": "q\nChoices: A: x B: y", "cot": "Think. So y.", "answer": "The answer is: B"},
            ("Think.", "So y."),
            "B",
            "choice",
        ),
        ("svamp", {"question_concat": "q", "Answer": "145.0", "Equation": "( 8.0 )"}, (), "145", "number"),
        ("gsm-hard", {"instruction": "q", "response": -9867630.5}, (), "-9867630.5", "number"),
        ("multiarith", {"question": " q", "final_ans": "18"}, (), "18", "number"),
        (
            "math-500",
            {"problem": "q", "solution": "s", "answer": "\\left( 3, \\frac{\\pi}{2} \\right)", "unique_id": "u"},
            ("s",),
            "\\left( 3, \\frac{\\pi}{2} \\right)",
            "number",
        ),
        ("aime24", {"id": 60, "problem": "q", "solution": "s", "answer": "033"}, ("s",), "33", "number"),
        ("aime25", {"id": "0", "problem": "q", "answer": "70"}, (), "70", "number"),
        ("amc23", {"id": 0, "question": "q", "answer": "27.0"}, (), "27", "number"),
        ("deepscaler", {"problem": "q", "answer": "-\\frac{2}{3}", "solution": ""}, (), "-\\frac{2}{3}", "number"),
        (
            "humaneval",
            {"task_id": "HumanEval/0", "prompt": "def f():\n", "test": "def check(c): pass", "entry_point": "f"},
            (),
            "def check(c): pass\n\ncheck(f)",
            "code",
        ),
        (
            "mbpp",
            {"task_id": 11, "text": "q", "code": "", "test_list": ["assert f()", "assert not g()"]},
            (),
            "assert f()\nassert not g()",
            "code",
        ),
    ],
)
def test_catalogue(
    tmp_path: Path, name: str, record: dict[str, Any], steps: tuple[str, ...], answer: str, answer_type: str
) -> None:
    path = write(tmp_path / "rows.jsonl", [record])
    (row,) = load_rows(name, "evaluation", options={"path": path})
    assert (row.steps, row.answer, row.answer_type, row.source) == (steps, answer, answer_type, name)
    assert row.id.startswith(f"{name}/evaluation/")


def test_every_catalogued_set_is_tested() -> None:
    marks = test_catalogue.pytestmark[0].args[1]
    assert {case[0] for case in marks} | {"gpqa-diamond", "livecodebench"} == set(CATALOGUE)


def test_programs_have_their_prompt_and_entry_point(tmp_path: Path) -> None:
    prompt = 'import math\n\n\ndef f(x):\n    """Squares x."""\n'
    record = {"task_id": "HumanEval/7", "prompt": prompt, "test": "def check(c):\n    pass\n", "entry_point": "f"}
    (row,) = load_rows("humaneval", "evaluation", options={"path": write(tmp_path / "he.jsonl", [record])})
    assert row.id == "humaneval/evaluation/HumanEval/7"
    assert json.loads(row.metadata) == {"prompt": prompt, "entry_point": "f"}
    assert row.question == prompt.strip()
    sanitized = {
        "task_id": 2,
        "prompt": "Square x.",
        "test_imports": ["import math"],
        "test_list": ["assert f(2) == 4"],
    }
    (row,) = load_rows("mbpp", "evaluation", options={"path": write(tmp_path / "mbpp.json", [sanitized])})
    assert row.question == "Square x.\nYour code should pass these tests:\n\nassert f(2) == 4"
    assert (row.answer, row.metadata) == ("import math\nassert f(2) == 4", "")
    with pytest.raises(ValueError, match=r"mbpp.json has no column 'test_list'; it has task_id, prompt"):
        load_rows(
            "mbpp", "evaluation", options={"path": write(tmp_path / "mbpp.json", [{"task_id": 1, "prompt": "q"}])}
        )


def test_expressions_are_kept_as_they_are_written(tmp_path: Path) -> None:
    answers = ["3,5", "1,234", r"\frac{1}{2}", "x^2 + 1"]
    path = write(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": a} for i, a in enumerate(answers)])
    rows = load_rows(path, "evaluation", options={"answer_type": "expression"})
    assert [(row.answer, row.answer_type) for row in rows] == [(answer, "number") for answer in answers]
    rows = load_rows(path, "evaluation")
    assert [(row.answer, row.answer_type) for row in rows[:2]] == [("3,5", "free"), ("1234", "number")]


def test_rows_are_dropped_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": i} for i in range(4)])
    assert [row.id for row in load_rows(path, "train", options={"drop": ["rows/1", "rows/2"]})] == ["rows/0", "rows/3"]
    with pytest.raises(ValueError, match=r"drop: .* has no row 'rows/9'; its first is 'rows/0'"):
        load_rows(path, "train", options={"drop": ["rows/9"]})


def test_rows_that_cannot_be_read_can_be_dropped(tmp_path: Path) -> None:
    answers = ["1", "x", "2", "y"]
    path = write(tmp_path / "rows.jsonl", [{"question": f"{i}?", "answer": a} for i, a in enumerate(answers)])
    number = {"answer_type": "number"}
    with pytest.raises(ValueError, match=r"row 2: the answer 'x' .*; 1 more rows .*\{drop: \[rows/1, rows/3\]\}"):
        load_rows(path, "train", options=number)
    assert [row.answer for row in load_rows(path, "train", options={**number, "drop": ["rows/1", "rows/3"]})] == [
        "1",
        "2",
    ]


def test_gsm8k_as_equations(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl", [GSM8K])
    (row,) = load_rows("gsm8k", "evaluation", options={"path": path, "steps": "equations"})
    assert row.steps == ("48/2=24", "48+24=72")


def test_gpqa_choices_have_a_fixed_order(tmp_path: Path) -> None:
    records = [{**GPQA, "Question": f"Which is a metal? ({i})"} for i in range(20)]
    path = write(tmp_path / "gpqa.jsonl", records)
    rows = load_rows("gpqa-diamond", "evaluation", options={"path": path})
    assert rows == load_rows("gpqa-diamond", "evaluation", options={"path": path})
    assert all(f"\n{row.answer}) iron" in row.question and row.answer_type == "choice" for row in rows)
    assert {row.answer for row in rows} == set("ABCD")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[tuple]]:
    """Makes `datasets.load_dataset` return the given records and lists its calls."""

    def serve(records: list[dict[str, Any]]) -> list[tuple]:
        calls: list[tuple] = []

        def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
            calls.append((name, config, split, revision))
            return records

        monkeypatch.setattr("datasets.load_dataset", load_dataset)
        return calls

    return serve


def test_hub_splits(hub: Callable[..., list[tuple]]) -> None:
    calls = hub([{"question": "1?", "answer": "1", "question_concat": "1?", "Answer": "1"}])
    assert load_rows("gsm8k", "train")[0].id == "gsm8k/train/0"
    load_rows("svamp", "evaluation", options={"revision": "abc"})
    assert load_rows("someone/sums", "validation", options={"config": "easy"})[0].source == "someone/sums"
    load_rows("someone/sums", "evaluation")
    assert calls == [
        ("openai/gsm8k", "main", "train", None),
        ("ChilleD/SVAMP", None, "train+test", "abc"),
        ("someone/sums", "easy", "validation", None),
        ("someone/sums", None, "test", None),
    ]
    with pytest.raises(ValueError, match="ChilleD/SVAMP has no train split"):
        load_rows("svamp", "train")
    with pytest.raises(ValueError, match="deepscaler has no option 'steps'"):
        load_rows("deepscaler", "train", options={"steps": "text"})


def test_hub_holdout(hub: Callable[..., list[tuple]]) -> None:
    hub([{"problem": f"{i}?", "answer": str(i)} for i in range(100)])
    sides = [load_rows("deepscaler", split, options={"holdout": True}) for split in ("train", "evaluation")]
    assert_disjoint(*sides)
    assert len(sides[0]) + len(sides[1]) == 100


def test_columns_may_have_the_names_of_trl_and_open_r1(tmp_path, caplog):
    """`prompt` (a text or one message of the user) or `problem`; `solution` where there is no answer."""
    message = [{"role": "user", "content": "1+1="}]
    for record in ({"prompt": message, "answer": "2"}, {"problem": "1+1=", "solution": "2"}):
        path = tmp_path / f"{len(record.get('prompt', ''))}.jsonl"
        path.write_text(json.dumps(record) + "\n")
        with caplog.at_level("INFO", logger="rl_soft"):
            (row,) = load_rows(str(path), "train")
        assert (row.question, row.answer, row.steps) == ("1+1=", "2", ())
    assert "the question is read from the column prompt" in caplog.text
    assert "the answer is read from the column solution" in caplog.text
    path.write_text(json.dumps({"prompt": "a", "question": "b", "answer": "2"}) + "\n")
    assert load_rows(str(path), "train")[0].question == "b"
