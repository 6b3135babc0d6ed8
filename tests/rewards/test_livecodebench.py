"""LiveCodeBench by file: made-up rows in its published form, their tests read without trust, programs judged.

pytest tests/rewards/test_livecodebench.py
"""

import base64
import json
import os
import pickle
import time
import zlib

import pytest
from conftest import tiny_policy

from rewards import livecodebench
from rewards.code import judge_programs
from rewards.livecodebench import cases_of, extract_program, same_output, unpack
from rl_soft.cli.app import main
from rl_soft.data.sources import load_rows
from rl_soft.evaluation.judging import check_golds, judge_rows

SUM = {"input": "3\n1 2 3\n", "output": "6\n", "testtype": "stdin"}
MORE = {"input": "2\n-5 5", "output": "0", "testtype": "stdin"}
CALL = {"input": "[1, 2, 3]\n2", "output": "[3, 4, 5]", "testtype": "functional"}


def packed(value, pickled=pickle.dumps):
    return base64.b64encode(zlib.compress(pickled(json.dumps(value)))).decode()


def row(public, private, **columns):
    given = {
        "question_id": "abc300_a", "question_content": "Add them.", "starter_code": "", "metadata": "{}",
        "public_test_cases": json.dumps(public), "private_test_cases": private,
    }  # fmt: skip
    return given | columns


STDIN = row([SUM], packed([MORE]))
FUNCTION = row(
    [],
    packed([CALL]),
    metadata=json.dumps({"func_name": "shift"}),
    starter_code="class Solution:\n    def shift(self):",
)


def fenced(program):
    return f"Some words, `x`.\n```python\n{program}\n```\nDone."


def outcome(program, problem=STDIN):
    return livecodebench.judge(fenced(program), problem).outcome


RIGHT = "n = int(input())\nprint(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    "program",
    [
        RIGHT,
        f"def main():\n    {RIGHT.replace(chr(10), chr(10) + '    ')}\nif __name__ == '__main__':\n    main()",
        "import sys\ndata = sys.stdin.read().split()\nprint(sum(map(int, data[1:])))\nsys.exit()",
        "n, *xs = map(int, open(0).read().split())\nprint(f'  {sum(xs)}.0  ')",
        "import sys\nfor i, s in enumerate(sys.stdin):\n    if i:\n        print(sum(map(int, s.split())), end='')",
        "import os\nn, *xs = map(int, os.read(0, 99).split())\nos.write(1, str(sum(xs)).encode())",
        "import sys\ninput = sys.stdin.buffer.readline\ninput()\nprint(sum(map(int, input().split())))",
        "input()\nprint(reduce(add, map(int, input().split())), Counter()['x'] or '')",  # names its checker imports
        "import threading\ndef main():\n    input()\n    print(sum(map(int, input().split())))\n"
        "threading.stack_size(1 << 26)\nt = threading.Thread(target=main)\nt.start()\nt.join()",
        "seen = globals().setdefault('seen', []) + [1]\nassert len(seen) == 1  # nothing is left of the run before\n"
        + RIGHT,
        "def depth(n):\n    return n and 1 + depth(n - 1)\nassert depth(20000) == 20000\n" + RIGHT,
    ],
)
def test_a_right_script_may_read_and_write_in_any_way(program):
    assert outcome(program) == "correct"


@pytest.mark.parametrize(
    "program",
    [
        "print(6)",  # right for the public test alone
        RIGHT + "\nprint()\nprint(1)",
        RIGHT.replace("print(", "print('Sum:', "),
        RIGHT + "\nraise ValueError",
        "print(",
        "import os\nos._exit(0)",
        "import os\n"  # frames of its own on every descriptor: it would have to know the right outputs
        "for d in range(20):\n    try:\n        os.write(d, (2).to_bytes(8, 'little') + b'6\\n')\n"
        "    except OSError:\n        pass",
        "x = bytearray(4 << 30)",
        "while True:\n    print('6' * 100000)",
    ],
)
def test_a_wrong_script_is_wrong(program):
    assert outcome(program) == "wrong"


def test_a_loop_ends_with_its_cpu_time_and_cannot_catch_that(monkeypatch):
    monkeypatch.setattr(livecodebench, "SECONDS", 0.3)
    start = time.monotonic()
    assert outcome("while True:\n    try:\n        while True: pass\n    except BaseException: pass") == "wrong"
    assert time.monotonic() - start < 5


def test_the_right_outputs_are_not_in_the_process():
    """Everything that the collector knows, every frame and every file of its folder is searched for one."""
    search = (
        "import gc, os, re, sys\nseen = gc.get_objects()\nframe = sys._getframe()\n"
        "while frame:\n    seen += list(frame.f_locals.values())\n    frame = frame.f_back\n"
        "texts = [str(o) for o in seen if isinstance(o, (str, bytes, dict, list, tuple))]\n"
        "texts += [open(name).read() for name in os.listdir('.')]\n"
        "print(*set(re.findall('(?<![0-9])7351[0-9]{4}(?![0-9])', ' '.join(texts))))"
    )
    secret = {"input": "", "output": "73510264", "testtype": "stdin"}
    assert outcome(search, row([secret], "[]")) == "wrong"
    assert outcome(search, row([{**secret, "input": "73510264"}], "[]")) == "correct", "what is there is found"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("class Solution:\n    def shift(self, xs: List[int], k) -> List[int]:\n        return [x + k for x in xs]",
         "correct"),
        ("def shift(xs, k):\n    print('noise')\n    return tuple(x + k for x in xs)", "correct"),
        ("class Solution:\n    def shift(self, xs, k):\n        return {3, 4, 5}", "wrong"),
        ("class Solution:\n    def shift(self, xs, k):\n        return '[3, 4, 5]'", "wrong"),
        ("class Solution:\n    def move(self, xs, k):\n        return [3, 4, 5]", "wrong"),
        ("def shift(xs):\n    return [3, 4, 5]", "wrong"),
    ],
)  # fmt: skip
def test_a_function_is_called_with_json_and_its_result_compared_as_json(program, expected):
    assert outcome(program, FUNCTION) == expected


@pytest.mark.parametrize(
    ("found", "gold", "same"),
    [
        ("1 2\n3", " 1 2 \n3\n\n", True),
        ("1.50 2e1", "1.5 20", True),
        ("1\n\n2", "1\n2", False),
        ("yes", "YES", False),
        ("0.1", "0.10000000000000001", False),
        ("50000000000000000", "50000000000000001", False),
        ("nan", "NaN", False),
        ("sNaN 1", "2 1", False),
        ("", " ", True),
        ("1  2", "1 2", True),
    ],
)
def test_lines_are_compared_as_texts_and_as_exact_numbers(found, gold, same):
    assert same_output(found, gold) == same


def test_the_last_block_is_the_program():
    assert extract_program("```\na\n```\n```python\nb\n```") == "b"
    assert extract_program("<think>```\na\n```</think>none") is None
    assert extract_program("```\na") is None and extract_program("print(1)") is None
    assert livecodebench.judge("print(1)", STDIN).outcome == "unparsed"


def test_private_tests_are_a_packed_text_of_any_protocol_or_plain_json():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        text = packed([MORE], lambda value, p=protocol: pickle.dumps(value, p))
        assert cases_of(row([SUM], text)) == ("", ["3\n1 2 3\n", "2\n-5 5"], ["6\n", "0"])
    assert cases_of(row([], json.dumps([CALL]), metadata='{"func_name": "f"}')).function == "f"


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_a_malicious_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def raw(data):
        return base64.b64encode(zlib.compress(data)).decode()

    huge = b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x."  # a text that says it is a terabyte
    memo = b"\x80\x04\x8c\x01[r\xff\xff\xff\x7f\x8c\x01]."  # an index that would make room for 2^31 objects
    for data, message in (
        (pickle.dumps(Evil()), "a pickle of one text is all that is read"),
        (pickle.dumps([1, 2]), "holds EMPTY_LIST"),
        (b"cos\nsystem\n(S'touch evil-was-here'\ntR.", "holds GLOBAL"),
        (huge, "its pickle"),
        (memo, "holds SHORT_BINUNICODE"),
        (b"\x80\x04.", "holds STOP"),
        (b"", "its pickle"),
        (pickle.dumps("[" * 100_000), "is not JSON"),
        (pickle.dumps("[1]"), "a test must have the texts"),
        (pickle.dumps("{}"), "must be a list of tests"),
    ):
        with pytest.raises(ValueError, match=message):
            cases_of(row([], raw(data)))
    assert not list(tmp_path.iterdir())


def test_a_bomb_stops_at_its_bound(monkeypatch):
    monkeypatch.setattr(livecodebench, "MAX_BYTES", 1 << 20)
    bomb = base64.b64encode(zlib.compress(bytes(1 << 27), 9)).decode()  # 128 MiB in 170 kB
    start = time.process_time()
    with pytest.raises(ValueError, match="unpacks to more than 1 MiB"):
        unpack(bomb)
    assert time.process_time() - start < 1
    whole = packed([SUM])
    for text, message in (
        (whole[: len(whole) // 2 // 4 * 4], "is cut"),
        ("@", "neither JSON"),
        ("AAAA", "neither JSON"),
    ):
        with pytest.raises(ValueError, match=message):
            unpack(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (row([], "[]"), "has no tests"),
        (row([SUM, CALL], "[]"), "has tests of type functional, stdin"),
        (row([CALL], "[]"), "no func_name"),
        (row([{**SUM, "testtype": "manual"}], "[]"), "one of stdin, functional"),
        (row([], "[{]"), "private_test_cases is not JSON"),
    ],
)
def test_rows_without_usable_tests_are_named_before_any_model_work(tmp_path, given, message):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(given) + "\n")
    rows = load_rows("livecodebench", "evaluation", options={"path": str(path)})
    with pytest.raises(ValueError, match=rf"row livecodebench/evaluation/abc300_a: .*{message}"):
        check_golds(rows, "livecodebench", run_code=True)


def test_a_file_becomes_rows_in_the_form_of_the_benchmark(tmp_path):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({**r, "question_id": i}) + "\n" for i, r in enumerate([STDIN, FUNCTION])))
    rows = load_rows("livecodebench", "evaluation", options={"path": str(path)})
    assert [r.id for r in rows] == ["livecodebench/evaluation/0", "livecodebench/evaluation/1"]
    assert "Read the inputs from stdin" in rows[0].question and "# YOUR CODE HERE" in rows[0].question
    assert "```python\nclass Solution:" in rows[1].question and len(rows[1].answer) < 50
    with pytest.raises(ValueError, match="to allow that, evaluate with"):
        check_golds(rows, "livecodebench")
    check_golds(rows, "livecodebench", run_code=True)
    texts = [fenced(RIGHT), fenced("def shift(xs, k):\n    return [x + k for x in xs]")]
    assert [j.outcome for j in judge_rows(texts, rows, run_code=True)] == ["correct", "correct"]
    metadata = [json.loads(r.metadata) for r in rows]
    assert judge_programs(texts[::-1], ["", ""], metadata)[0].outcome == "wrong"
    with pytest.raises(ValueError, match=r"read from its published files: dataset_options: \{path: FILE.jsonl\}"):
        load_rows("livecodebench", "evaluation")


def test_eval_runs_them_where_that_is_confirmed(tmp_path, capsys):
    made = tiny_policy()
    for part in (made.model, made.tokenizer):
        part.save_pretrained(tmp_path / "model")
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps({**STDIN, "question_content": "1+1="}) + "\n")
    words = ["eval", str(tmp_path / "model"), "--dataset", "livecodebench", "--dataset_options", f"{{path: {path}}}"]
    words += ["--output_dir", str(tmp_path / "out"), "--end_of_thinking", "#", "--eval_samples", "1"]
    words += ["--num_thoughts", "4", "--question_template", "1+{question}"]
    with pytest.raises(SystemExit):
        main(words)
    assert "confirm_run_unsafe_code" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the tiny model has 128 positions: it gets as far as the length of the question
        main([*words, "--confirm_run_unsafe_code", "true"])
    assert "positions" in capsys.readouterr().err
