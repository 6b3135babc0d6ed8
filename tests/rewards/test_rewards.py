r"""Rewards: extraction, comparison, the worker processes, and the conventions of TRL.

pytest tests/rewards/test_rewards.py
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from functools import partial

import answer_cases as cases
import math_verify_cases
import pytest
from conftest import ROOT

from rewards import CosineScaled, LengthCost, Overlong, StrictFormat, ThoughtCost, answers, math_accuracy, symbolic
from rewards.answers import canonical, equal, judge, judge_many, unreadable_golds
from rewards.extraction import extract

EXTRACTIONS = {
    "number": cases.EXTRACT_NUMBER,
    "choice": cases.EXTRACT_CHOICE,
    "bool": cases.EXTRACT_BOOL,
    "free": cases.EXTRACT_FREE,
}
TOWER = "9^{9^{9^9}}"


@pytest.fixture
def no_worker(monkeypatch):
    """Fails a test that would start a worker."""
    monkeypatch.setattr(symbolic, "Worker", lambda: pytest.fail("a plain answer went to math-verify"))


@pytest.mark.parametrize(
    ("kind", "text", "flexible", "strict"),
    [(kind, *case) for kind, table in EXTRACTIONS.items() for case in table],
)
def test_extraction(kind, text, flexible, strict):
    assert extract(text, kind) == flexible
    assert extract(text, kind, strict=True) == strict


@pytest.mark.parametrize(("kind", "prediction", "gold"), cases.EQUAL)
def test_equal(no_worker, kind, prediction, gold):
    assert equal(prediction, gold, kind)


@pytest.mark.parametrize(("kind", "prediction", "gold"), cases.UNEQUAL)
def test_unequal(no_worker, kind, prediction, gold):
    assert not equal(prediction, gold, kind)


def test_the_table_is_large():
    assert sum(map(len, EXTRACTIONS.values())) + len(cases.EQUAL) + len(cases.UNEQUAL) + len(cases.SYMBOLIC) >= 300


def test_symbolic_answers():
    texts, golds, expected = zip(*cases.SYMBOLIC, strict=True)
    outcomes = [judgement.outcome for judgement in judge_many(texts, golds, ["number"] * len(texts))]
    assert outcomes == list(expected)


def test_math_verify_agrees_with_us():
    agreed, different = math_verify_cases.AGREED, math_verify_cases.DIFFERENT
    golds, texts, expected = zip(*agreed, *different, strict=True)
    ours = []
    for i in range(0, len(texts), 32):  # the time limit is that of a batch
        batch = judge_many(texts[i : i + 32], golds[i : i + 32], ["number"] * len(texts[i : i + 32]))
        ours += [judgement.outcome == "correct" for judgement in batch]
    assert ours == [verdict != (i >= len(agreed)) for i, verdict in enumerate(expected)]


@pytest.mark.parametrize("gold", ["3", "4"])
@pytest.mark.parametrize("text", [text for text, flexible, _ in cases.EXTRACT_NUMBER if flexible == "3, 4"])
def test_hedging_does_not_pay(no_worker, text, gold):
    assert judge(text, gold) == ("wrong", "3, 4")


def test_votes_are_counted_by_value():
    assert {canonical(text) for text in ("1,234.0", "1234", "$1,234", "x = 1234")} == {"1234"}
    assert canonical("0.5") == canonical(r"\frac{1}{2}") == str(Fraction(1, 2))
    assert canonical("(b)", "choice") == canonical("B", "choice") == "B"
    assert canonical("yes", "bool") == canonical("True", "bool") == "true"


def test_unreadable_golds_are_found():
    golds = ["12", "", r"\sqrt{2}", "Evelyn", r"\frac{", "B", "dog", "yes"]
    assert unreadable_golds(golds, ["number"] * 5 + ["choice", "choice", "bool"]) == [1, 4, 6]


def test_an_unknown_answer_type_names_the_nearest():
    with pytest.raises(ValueError, match="nearest is 'number'"):
        extract("12", "numbers")


# --- Abuse -----------------------------------------------------------------------------------------------------------

ABUSE = ["{", "}", r"\boxed{", r"\boxed{1}", "the answer is 3 or ", "answer ", "1,11,", "1/", "$1", r"\(", r"\frac{"]
ABUSE += [
    "#### ",
    "10^",
    "½",
    "\x00",
    "\ud800",
    "3 or ",
    "A or ",
    "yes or ",
    "1 x 10^",
    "9**",
    "-",
    "\n",
    "{,}",
    "<think>",
]


@pytest.mark.parametrize("unit", ABUSE)
def test_time_is_linear_in_the_text(unit):
    text = unit * (100_000 // len(unit))
    for kind in answers.ANSWER_TYPES:
        start = time.process_time()
        extract(text, kind)
        assert time.process_time() - start < 5  # about 0.3 s; a quadratic pattern takes minutes


@pytest.mark.parametrize("kind", answers.ANSWER_TYPES)
def test_nothing_raises(no_worker, kind):
    texts = [*ABUSE, "9**9**9", "\x00" * 9, "\ud800\udfff", "1e999999999", "1/0", "{" * 2000, "9" * 5000, "9" * 900]
    for text in texts:
        for gold in ("3", "A", "yes"):
            assert judge(text, gold, kind)[0] in ("correct", "wrong", "unparsed")


# --- The worker ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(monkeypatch):
    """A pool of one worker with short limits."""
    monkeypatch.setattr(symbolic, "CPU_SECONDS", 0.5)
    pool = symbolic.Pool(workers=1)
    yield pool
    pool.close()


def worker_of(pool):
    worker = pool.idle.get_nowait()
    pool.idle.put(worker)
    return worker


def test_a_slow_pair_is_a_counted_timeout_and_the_worker_is_replaced(pool):
    assert pool.verify([("x+1", "1+x")]) == [True]
    first = worker_of(pool).process
    assert pool.verify([(TOWER, r"2\pi"), ("2x", "x+x")]) == ["timeout", True]
    assert first.poll() == -signal.SIGPROF
    assert worker_of(pool).process.poll() is None


def test_a_worker_that_stops_replying_is_killed(pool, monkeypatch):
    assert pool.verify([("x", "y")]) == [False]
    stuck = worker_of(pool).process
    monkeypatch.setattr(symbolic, "WALL_SECONDS", 0.2)
    os.kill(stuck.pid, signal.SIGSTOP)
    assert pool.verify([("x+1", "1+x")]) == ["timeout"]
    assert stuck.poll() is not None


def test_a_worker_that_died_while_idle_costs_nothing(pool):
    assert pool.verify([("x", "y")]) == [False]
    worker_of(pool).process.kill()
    assert pool.verify([("x+1", "1+x")]) == [True]


def test_memory_is_limited(pool, monkeypatch):
    assert pool.verify([("x", "y")]) == [False]
    limits = (ROOT / f"/proc/{worker_of(pool).process.pid}/limits").read_text()
    assert f"Max address space         {symbolic.MEMORY_BYTES}" in limits


def test_a_worker_sees_no_gpu_and_does_not_outlive_its_parent():
    code = (
        "from rewards import symbolic; pool = symbolic._pool; pool.verify([('x', 'x+0')]);"
        "pid = pool.idle.get().process.pid;"
        "print(pid, 'CUDA_VISIBLE_DEVICES=\\0' in open(f'/proc/{pid}/environ').read(), flush=True);"
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    pid, hidden = done.stdout.split()
    assert hidden == "True"
    for _ in range(100):
        if not alive(int(pid)):
            return
        time.sleep(0.1)
    pytest.fail("the worker is still there")


def alive(pid):
    try:
        return (ROOT / f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_missing_math_verify_is_an_error_not_a_score(monkeypatch):
    monkeypatch.setattr(symbolic.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="math_verify"):
        symbolic.Pool(workers=1).verify([("x", "y")])


def test_threads_share_the_workers_and_the_alarm_stays_ours():
    ours = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGALRM)
        scores = {}

        def score(i):
            scores[i] = math_accuracy([""] * 2, [r"\boxed{x+1}", rf"\boxed{{{i}}}"], ["1+x", "3"])

        threads = [threading.Thread(target=score, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert scores == {i: [1.0, float(i == 3)] for i in range(6)}
        assert signal.getsignal(signal.SIGALRM) is handler
    finally:
        signal.signal(signal.SIGALRM, ours)


# --- TRL -------------------------------------------------------------------------------------------------------------


def test_accuracy_takes_both_forms_of_completion_and_logs(no_worker):
    logged = {}
    completions = [
        "12",
        [{"role": "assistant", "content": "13"}],
        "no idea",
        [{"role": "assistant", "content": None}],
        "5",
    ]
    columns = {"completion_ids": [[1]] * 5, "trainer_state": None, "log_extra": None, "source": ["test"] * 5}
    rewards = math_accuracy(
        [""] * 5, completions, ["12", "12", "12", "12", None], log_metric=logged.__setitem__, **columns
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0, None]
    assert logged == {
        "math_accuracy/unparsed_rate": 2 / 5,
        "math_accuracy/grader_failures": 0,
        "math_accuracy/unreadable_golds": 1,
    }


def test_accuracy_reads_the_types_and_the_golds_of_gsm8k(no_worker):
    golds = ["3 + 4 = 7\n#### 7", "B", "yes", 7]
    types = ["number", "choice", "bool", "number"]
    assert math_accuracy([""] * 4, ["7.0", "(B)", "Yes.", "7"], golds, answer_type=types) == [1.0] * 4


def test_a_grader_failure_is_zero_and_counted(monkeypatch):
    logged = {}
    monkeypatch.setattr(symbolic, "verify", lambda pairs: ["timeout", "gold", "prediction"][: len(pairs)])
    rewards = math_accuracy([""] * 3, [r"\boxed{x+1}"] * 3, ["y+1", r"\frac{", "z+1"], log_metric=logged.__setitem__)
    assert rewards == [0.0, None, 0.0]
    assert logged["math_accuracy/grader_failures"] == 1
    assert logged["math_accuracy/unreadable_golds"] == 1


def test_strict_accuracy_is_a_partial():
    strict = pickle.loads(pickle.dumps(partial(math_accuracy, strict=True)))
    assert strict([""] * 2, ["12", "#### 12"], ["12", "12"]) == [0.0, 1.0]


REWARDS = [
    StrictFormat(),
    StrictFormat("hashes", think=True),
    Overlong(100, 20),
    CosineScaled(100),
    LengthCost(0.01, 5),
    ThoughtCost(0.1),
]


@pytest.mark.parametrize("reward", REWARDS, ids=repr)
def test_parameterised_rewards_pickle_and_keep_the_length(reward):
    again = pickle.loads(pickle.dumps(reward))
    batch = {
        "prompts": ["q"] * 3,
        "completions": ["a", "", "c"],
        "completion_ids": [[1], [], [3]],
        "answer": ["1"] * 3,
    }
    assert again == reward
    names = ("strict_format", "overlong", "length_cost", "thought_cost", "cosine_scaled_reward")
    assert again.__name__ in names
    assert len(again(**batch, log_metric=None)) == 3


def test_strict_format():
    def score(text, **options):
        return StrictFormat(**options)([text])[0]

    assert score(r"so \boxed{3}.") == 1
    assert score(r"so $\boxed{3}$") == 1
    assert score(r"\boxed{3} or \boxed{4}") == 0
    assert score(r"\boxed{3} I think") == 0
    assert score("so 3") == 0
    assert score("x\n#### 3\n", mark="hashes") == 1
    assert score("#### 3\nmore", mark="hashes") == 0
    assert score(r"<think>hm</think>\boxed{3}", think=True) == 1
    assert score(r"hm</think>\boxed{3}", think=True) == 1
    assert score(r"<think>hm \boxed{3}", think=True) == 0
    assert score(r"<think>a</think><think>b</think>\boxed{3}", think=True) == 0
    with pytest.raises(ValueError, match="mark"):
        StrictFormat("bold")  # type: ignore[arg-type]


def test_length_rewards():
    ids = [[0] * n for n in (10, 80, 90, 100, 200)]
    assert Overlong(100, 20)(completion_ids=ids) == [0, 0, -0.5, -1, -1]
    assert LengthCost(0.5, 80)(completion_ids=ids) == [0, 0, -5, -10, -60]
    assert ThoughtCost(0.5, 2)(completions=["", "", ""], thoughts=[1, 4, None]) == [0, -1, None]
    assert ThoughtCost(0.5)(completions=["", ""]) == [None, None]
    with pytest.raises(ValueError, match="buffer"):
        Overlong(10, 20)
    with pytest.raises(ValueError, match="negative"):
        ThoughtCost(-1)


@pytest.mark.parametrize("buffer", [0, 20, 100])
def test_overlong_is_trl_s(buffer):
    from trl.rewards import get_soft_overlong_punishment

    ids = [[0] * n for n in (0, 1, 79, 80, 81, 99, 100, 101, 500)]
    ours, theirs = Overlong(100, buffer), get_soft_overlong_punishment(100, buffer)
    assert ours(completion_ids=ids) == pytest.approx(theirs(completion_ids=ids))


def test_cosine_scaling_is_trl_s():
    from trl.rewards import get_cosine_scaled_reward

    texts = [r"\boxed{3}", r"\boxed{4}"] * 6
    ids = [[0] * n for n in (0, 1, 25, 50, 75, 99, 100, 101, 150, 200, 10, 60)]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    for values in ({}, {"min_value_wrong": -2.0, "max_value_wrong": 0.0, "max_value_correct": 3.0}):
        theirs = get_cosine_scaled_reward(100, **values)(completions=chats, solution=["$3$"] * 12, completion_ids=ids)
        ours = CosineScaled(100, **values)([""] * 12, texts, ["3"] * 12, ids)
        assert ours == pytest.approx(theirs) and len(set(ours)) > 8
    assert CosineScaled(100)(["", ""], ["3", "3"], ["", "3"], [[1], [1]])[0] is None
    with pytest.raises(ValueError, match="max_length must be at least 1, not 0"):
        CosineScaled(0)


def test_the_rewards_import_no_torch_and_no_sympy():
    code = "import sys, rewards; print(sorted({'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"
