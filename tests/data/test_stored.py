r"""Files and values of any kind: a row says what its file says, or is refused by file and row.

pytest tests/data/test_stored.py
"""

import csv
import gzip
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rl_soft.data.row import plain_number
from rl_soft.data.sources import load_rows
from rl_soft.data.stored import CATALOGUE

LINE = json.dumps({"question": "a", "answer": 1}) + "\n"
NAN = float("nan")


def jsonl(folder: Path, *records: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def loaded(folder: Path, record: dict[str, Any], **kwargs: Any) -> Any:
    (row,) = load_rows(jsonl(folder, {"question": "a", "answer": 1, **record}), "train", **kwargs)
    return row


# Files

PACKED = gzip.compress((LINE * 500).encode())
BROKEN = {
    "cut.jsonl.gz": (PACKED[:60], "cut.jsonl.gz is cut or broken"),
    "no_end.jsonl.gz": (PACKED[:-4], "no_end.jsonl.gz is cut or broken"),
    "sum.jsonl.gz": (PACKED[:-8] + b"\0" * 8, "sum.jsonl.gz is not a whole gzip file"),
    "flipped.jsonl.gz": (PACKED[:12] + b"\xff\xff\xff\xff" + PACKED[16:], "flipped.jsonl.gz is cut or broken"),
    "plain.jsonl.gz": (LINE.encode(), "plain.jsonl.gz is not a whole gzip file"),
    "rows.csv.gz": (gzip.compress(b"question,answer\na,1\n"), r"rows.csv.gz: of packed files only .jsonl.gz is read"),
    "latin.csv": ("question,answer\nCombien coûte le café ?,4\n".encode("latin-1"), "latin.csv is not in UTF-8"),
    "latin.jsonl.gz": (gzip.compress(b'{"question": "caf\xe9", "answer": 1}'), "latin.jsonl.gz is not in UTF-8"),
    "latin.json": (b'[{"question": "caf\xe9", "answer": 1}]', r"latin.json is not in UTF-8 \(byte 0xe9"),
    "utf16.jsonl": (LINE.encode("utf-16"), "utf16.jsonl is not in UTF-8"),
    "utf16.csv": ("question,answer\na,1\n".encode("utf-16"), "utf16.csv is not in UTF-8"),
    "wide.csv": (b"question,answer\na,1\nb,3, 5\n", "wide.csv, row 2 has 3 fields, and the file has 2 columns"),
    "twice.csv": (b"question,answer,answer\na,1,2\n", "twice.csv: two columns are named 'answer'"),
    "nameless.csv": (b"question,answer,,\na,1,2,3\n", "nameless.csv: two columns are named ''"),
    "open.csv": (b'question,answer\na,"1\nb,2\n', "open.csv, line 3: unexpected end of data"),
    "inner.csv": (b'question,answer\n"say ""a"" or "b", then",1\n', "inner.csv, line 2: "),
    "twice.jsonl": (LINE.encode() + b'{"question": "a", "answer": 1, "answer": 2}', "line 2: two columns .* 'answer'"),
    "deep.json": (b"[" * 100_000, "deep.json is nested too deeply"),
    "digits.jsonl": (b'{"question": "a", "answer": ' + b"1" * 5000 + b"}", "digits.jsonl, line 1: "),
    "table.parquet": (b"PAR1 and no more", "table.parquet is not a whole parquet file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_by_its_name_in_one_line(tmp_path: Path, name: str) -> None:
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(str(tmp_path / name), "train")
    assert "\n" not in str(error.value)


def test_a_column_of_a_table_named_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], ["question", "answer", "answer"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"t.parquet: two columns are named 'answer'"):
        load_rows(str(tmp_path / "t.parquet"), "train")


@pytest.mark.parametrize("name", ["folder", "folder.jsonl"])
def test_a_folder_is_no_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for source in (str(tmp_path / name), name, f"./{name}"):
        with pytest.raises(ValueError, match=rf"{name} is a folder; name a file in it"):
            load_rows(source, "train")
    with pytest.raises(ValueError, match="is a folder"):
        load_rows("gsm8k", "evaluation", options={"path": str(tmp_path / name)})


def test_a_path_of_another_suffix_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text(LINE)
    for source in (str(tmp_path / "rows.txt"), "./nothing/here.txt", "my/own/rows"):
        with pytest.raises(ValueError, match=r"a data file ends in \.jsonl, \.json, \.csv"):
            load_rows(source, "train")


def test_a_field_has_any_length_and_the_limit_of_others_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    solution = "x" * 140_000
    (tmp_path / "long.csv").write_text(f"question,answer,solution\nHow much is 2+2?,4,{solution}\n")
    (row,) = load_rows(str(tmp_path / "long.csv"), "train")
    assert (row.answer, row.steps) == ("4", (solution,))
    assert csv.field_size_limit() == before


def test_a_field_that_a_csv_row_leaves_out_is_missing(tmp_path: Path) -> None:
    (tmp_path / "short.csv").write_text("question,answer,solution\na,1\nb\n")
    with pytest.raises(ValueError, match=r"short.csv, row 2: no answer") as error:
        load_rows(str(tmp_path / "short.csv"), "train")
    assert "more rows" not in str(error.value)


@pytest.mark.parametrize("written", ["0.1000000000000000001", "12345678901234567890.5", "7", "-2.5", "1e3", "1E-7"])
def test_a_number_of_json_has_the_value_that_is_written(tmp_path: Path, written: str) -> None:
    (tmp_path / "n.jsonl").write_text(f'{{"question": "a", "answer": {written}}}')
    (row,) = load_rows(str(tmp_path / "n.jsonl"), "train")
    assert Decimal(row.answer) == Decimal(written)
    assert row.answer_type == "number"


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_a_number_of_parquet_is_the_shortest_of_its_precision(tmp_path: Path, kind: pa.DataType) -> None:
    answers = pa.array([0.1, 2.5, None], pa.float64()).cast(kind, safe=False)
    parquet.write_table(pa.table({"question": ["a", "b", "c"], "answer": answers}), tmp_path / "f.parquet")
    rows = load_rows(str(tmp_path / "f.parquet"), "train", options={"drop": ["f/2"]})
    assert [row.answer for row in rows] == ["0.1", "2.5"]


SOUND = [{"question": f"What, {i}?", "answer": str(i), "solution": f"a\n{i}"} for i in range(20)]


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz"])
def test_a_damaged_file_loads_or_is_refused_by_its_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "d.parquet":
        parquet.write_table(pa.Table.from_pylist(SOUND), path)
    elif name == "d.csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, SOUND[0])
            writer.writeheader()
            writer.writerows(SOUND)
    else:
        lines = json.dumps(SOUND) if name == "d.json" else "\n".join(map(json.dumps, SOUND))
        path.write_bytes(gzip.compress(lines.encode()) if name.endswith("gz") else lines.encode())
    sound, draw, refused = path.read_bytes(), random.Random(0), 0
    assert len(load_rows(str(path), "train")) == len(SOUND)
    for _ in range(150):
        at, inserted = (
            draw.randrange(len(sound)),
            draw.choice([b'"', b",", b"\n", b"{", b"\0", b"NaN", b"\xff", b"1e9"]),
        )
        tail = sound[at + draw.randrange(3) :] if draw.random() < 0.8 else b""
        path.write_bytes(sound[:at] + inserted + tail)
        try:
            load_rows(str(path), "train")
        except ValueError as error:
            refused += 1
            assert name in str(error)
    assert refused > 30


# Values

VALUES: list[tuple[Any, str]] = [
    (["4"], "is a list, not a text"),
    ([], "is a list, not a text"),
    ({"value": 4}, "is an object, not a text"),
    (NAN, "no {}: NaN"),
    (float("inf"), "is Infinity, which is no number"),
    (float("-inf"), "is -Infinity, which is no number"),
    ("half \ud83d", "is no Unicode character"),
]


@pytest.mark.parametrize("column", ["question", "answer", "id", "family", "answer_type"])
@pytest.mark.parametrize(("value", "message"), VALUES)
def test_what_is_no_text_is_refused_by_row(tmp_path: Path, column: str, value: Any, message: str) -> None:
    message = message.format(column).replace("Infinity", "inf")
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 2: .*{message}"):
        load_rows(
            jsonl(tmp_path, {"question": "a", "answer": 1}, {"question": "b", "answer": 1, column: value}), "train"
        )


@pytest.mark.parametrize("column", ["question", "answer"])
@pytest.mark.parametrize("value", [None, "", " \n"])
def test_nothing_is_no_text(tmp_path: Path, column: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 1: no {column}"):
        loaded(tmp_path, {column: value})


@pytest.mark.parametrize("column", ["id", "family", "answer_type", "steps"])
def test_none_of_another_column_is_none(tmp_path: Path, column: str) -> None:
    assert loaded(tmp_path, {column: None}) == loaded(tmp_path, {})


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (pa.binary(), b"4", "answer is bytes"),
        (pa.list_(pa.string()), ["4"], "answer is a list"),
        (pa.struct({"value": pa.int64()}), {"value": 4}, "answer is an object"),
        (pa.map_(pa.string(), pa.int64()), [("value", 4)], "answer is a list"),
        (pa.float32(), NAN, "no answer: NaN"),
        (pa.float64(), NAN, "no answer: NaN"),
        (pa.date32(), 0, "answer is a date"),
    ],
)
def test_values_of_parquet(tmp_path: Path, kind: pa.DataType, value: Any, message: str) -> None:
    table = pa.table({"question": ["a"], "answer": pa.array([value], kind, from_pandas=False)})
    parquet.write_table(table, tmp_path / "v.parquet")
    with pytest.raises(ValueError, match=f"v.parquet, row 1: {message}"):
        load_rows(str(tmp_path / "v.parquet"), "train")


def test_values_of_a_hub_set(monkeypatch: pytest.MonkeyPatch) -> None:
    records = [{"question": "a", "answer": ["4"]}]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: records)
    with pytest.raises(ValueError, match=r"someone/sums, row 1: answer is a list"):
        load_rows("someone/sums", "train")


@pytest.mark.parametrize("column", ["steps", "cot", "solution"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "is 7, neither a text nor a list"),
        (0.5, "is 0.5, neither a text nor a list"),
        (True, "is True, neither a text nor a list"),
        (NAN, "is nan, neither a text nor a list"),
        ({"first": "2+2=4"}, "is an object, neither a text nor a list"),
        ([{"text": "2+2=4"}], "step 1 is an object"),
        (["2+2=4", None], "step 2 is None"),
        (["2+2=4", ["4"]], "step 2 is a list"),
        (["2+2=4", NAN], "no .*step 2: NaN"),
        ([False], "step 1 is False"),
        ("half \ud83d", "is no Unicode character"),
        (["half \ud83d"], "is no Unicode character"),
    ],
)
def test_steps_that_are_no_texts(tmp_path: Path, column: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: .*{message}"):
        loaded(tmp_path, {column: value})


def test_steps_that_are_texts(tmp_path: Path) -> None:
    for value, steps in (("a\nb", ("a", "b")), (["a\nb", 4], ("a\nb", "4")), ([], ()), ("", ())):
        assert loaded(tmp_path, {"steps": value}).steps == steps


@pytest.mark.parametrize("name", ["gpqa-diamond", "humaneval", "mbpp", "gsm8k"])
def test_a_field_of_a_known_set_that_is_no_text(tmp_path: Path, name: str) -> None:
    """Whatever a field of the published files holds, a traceback is no answer."""
    records = {
        "gpqa-diamond": {"Question": "?", "Correct Answer": "a", **{f"Incorrect Answer {i}": "b" for i in (1, 2, 3)}},
        "humaneval": {"task_id": "x/0", "prompt": "def f():", "test": "def check(c): pass", "entry_point": "f"},
        "mbpp": {"task_id": 1, "text": "q", "test_list": ["assert f()"]},
        "gsm8k": {"question": "q", "answer": "#### 4"},
    }
    assert name in CATALOGUE
    for column in sorted(set(records[name]) - {"task_id"}):
        for value in (None, ["x", 3], {"x": 1}):
            path = jsonl(tmp_path, records[name], {**records[name], column: value})
            with pytest.raises(ValueError, match=r"rows.jsonl, row 2: "):
                load_rows(name, "evaluation", options={"path": path})


# Chat messages

USER = {"role": "user", "content": " What is 2+2?\n"}


def test_one_message_of_the_user_is_its_text(tmp_path: Path) -> None:
    parts = {"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}
    for messages in ([USER], [parts]):
        assert loaded(tmp_path, {"prompt": messages}, columns={"question": "prompt"}).question == "What is 2+2?"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([USER, {"role": "assistant", "content": "4"}, USER], "messages user, assistant, user, .*SoftGRPOTrainer"),
        ([{"role": "system", "content": "Be short."}, USER], "messages system, user, .*SoftGRPOTrainer"),
        ([{"role": "assistant", "content": "4"}], "messages assistant"),
        ([{"role": "user"}], "no question"),
        ([{"role": "user", "content": ""}], "no question"),
        ([{"role": "user", "content": [{"type": "image"}]}], "no question"),
        ([{"role": "user", "content": ["a", "b"]}], "question is a list"),
        ([{"from": "human", "value": "a"}], "question is a list"),
        (["What is 2+2?"], "question is a list"),
        (USER, "question is an object"),
    ],
)
def test_other_chats_are_refused(tmp_path: Path, messages: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"rows.jsonl, row 1: .*{message}"):
        loaded(tmp_path, {"question": messages})


# Golds

LISTS = ["12, 15", "3,5", "1,2,3", "12 15", "1, 234", "12,34", "1234,567", "0,500", "5$6", "1_000", "1,234,5", "- -5"]


@pytest.mark.parametrize("gold", LISTS)
def test_several_numbers_are_not_one(tmp_path: Path, gold: str) -> None:
    row = loaded(tmp_path, {"answer": gold})
    assert (row.answer, row.answer_type) == (gold, "free")
    with pytest.raises(ValueError, match=r"row 1: the answer .* is not a number"):
        loaded(tmp_path, {"answer": gold}, options={"answer_type": "number"})


def test_a_number_is_itself_in_every_form() -> None:
    draw = random.Random(0)
    for _ in range(500):
        value = Decimal(draw.randrange(-(10**9), 10**9)).scaleb(-draw.randrange(4))
        sign, digits = ("-" if value < 0 else ""), f"{abs(value):,}"
        forms = (f"{value}", f"{value:,}", f"{value:e}", f"{sign}${digits}", f"${sign}{digits}$", f" {sign} {digits} ")
        for form in (*forms, f"{value:,}".replace("-", "−"), f"{value}0" if "." in str(value) else f"{value}."):
            found = plain_number(form)
            assert Decimal(found) == value, form
            assert "," not in found and "E" not in found and not (("." in found) and found.endswith("0"))


@pytest.mark.parametrize(
    ("kind", "gold", "answer"),
    [
        ("choice", "B", "B"),
        ("choice", "(c)", "C"),
        ("choice", "The answer is: B.", "B"),
        ("choice", "**Answer:** d", "D"),
        ("choice", "A or B", None),
        ("choice", "A, B", None),
        ("choice", "not A", None),
        ("choice", "AB", None),
        ("choice", "B) iron", None),
        ("bool", "Yes", "true"),
        ("bool", "The answer is no.", "false"),
        ("bool", True, "true"),
        ("bool", "not true", None),
        ("bool", "yes and no", None),
    ],
)
def test_choices_and_booleans_are_one_word(tmp_path: Path, kind: str, gold: Any, answer: str | None) -> None:
    if answer is None:
        with pytest.raises(ValueError, match=f"row 1: the answer '.*' is not a {kind}"):
            loaded(tmp_path, {"answer": gold, "answer_type": kind})
    else:
        assert loaded(tmp_path, {"answer": gold, "answer_type": kind}).answer == answer


# LaTeX whose backslashes JSON has taken for its own

COMMANDS = [
    r"\frac{1}{2}", r"\boxed{3}", r"2 \times x", r"\text{Monday}", r"\theta", r"\beta", r"\binom{4}{2}", r"\rho",
    r"x \neq 2", r"\nabla f", r"\left(3, \right)", r"\tan x", r"\bar{x}", r"\forall x", r"x \to 0", r"x \notin A",
    r"2 \nmid 3", r"\tau", r"\tfrac12", r"\rangle", r"\begin{pmatrix} 1 \end{pmatrix}", r"\frac12", r"x \ne 2", r"\nu",
]  # fmt: skip


def eaten(command: str) -> str:
    for letter, character in zip("fbtnr", "\f\b\t\n\r", strict=True):
        command = command.replace(f"\\{letter}", character)
    return command


@pytest.mark.parametrize("answer_type", [None, "number", "free", "expression"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_eaten_command_in_a_gold_is_refused(tmp_path: Path, command: str, answer_type: str | None) -> None:
    options = {} if answer_type is None else {"answer_type": answer_type}
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1: answer: the control character \\[fbtnr] before"):
        loaded(tmp_path, {"answer": eaten(command)}, options=options)
    if answer_type != "number":
        assert loaded(tmp_path, {"answer": command}, options=options).answer == command


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != r"x \ne 2"])
def test_an_eaten_command_in_a_question_is_refused(tmp_path: Path, command: str) -> None:
    """`\\ne` is left out: a line of a question may begin with `e`."""
    with pytest.raises(ValueError, match=r"row 1: question: the control character"):
        loaded(tmp_path, {"question": f"What is ${eaten(command)}$?"})
    assert loaded(tmp_path, {"question": f"What is ${command}$?"}).question == f"What is ${command}$?"


@pytest.mark.parametrize(
    "question",
    [
        "Name\tAge\nAnn\t7\nWhich\tone\tof an\tother?",
        "First line.\nsecond line\n\n\tindented\nnot far\nis it i?\ne.g. this",
        "A page.\f\nAnother page.",
        "Lines of Windows.\r\nnext\r\nright?",
        "Let $x = 1$.\nexplain\teach step of $$\nx + 1\n$$",
        "Unicode: \u2028 and \u00a0 stay",
    ],
)
def test_questions_keep_their_lines_and_tabs(tmp_path: Path, question: str) -> None:
    assert loaded(tmp_path, {"question": question}).question == question


def test_an_answer_of_several_lines_is_free_and_code_has_tabs(tmp_path: Path) -> None:
    assert loaded(tmp_path, {"answer": "1 2\n3 4\n"}).answer == "1 2\n3 4"
    tests = "def check(f):\n\tassert f(1)\n\tassert f(2)"
    assert loaded(tmp_path, {"answer": tests, "answer_type": "code"}).answer == tests


def test_splits_of_a_hub_set_have_the_names_that_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: Any, split: str, **kwargs: Any) -> list[dict[str, str]]:
        asked.append(split)
        return [{"question": f"{split}?", "answer": "4"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    options = {"train_split": "train[:5%]", "evaluation_split": "validation"}
    for split in ("train", "evaluation", "test"):
        load_rows("someone/sums", split, options=options)
    assert asked == ["train[:5%]", "validation", "test"]
