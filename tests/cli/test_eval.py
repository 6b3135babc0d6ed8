"""`rl-soft eval`: the records of any number of processes and interruptions are those of one whole run.

pytest tests/cli/test_eval.py
"""

import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from conftest import ROOT, TINY, VOCABULARY, tiny_policy

from rl_soft import cli
from rl_soft.cli import eval as eval_command
from rl_soft.config.reading import parse_overrides
from rl_soft.config.recipe import load_command, load_recipe
from rl_soft.data.sources import Row
from rl_soft.data.sources import load_rows as load
from rl_soft.evaluation import judging, records
from rl_soft.evaluation import samples as evaluate
from rl_soft.model import policy
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking
from rl_soft.train import pipeline as train

THINKING = Thinking(thought_k=3, num_thoughts=3, answer_prompt="#", step_separator=";", max_answer_tokens=4)
PROBLEMS, SAMPLES = 6, 5
OPTIONS = {"min_terms": 2, "max_terms": 4, "compact": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model folder of ours with random weights."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    made = tiny_policy()
    policy.save(folder, made.model.save_pretrained, made.tokenizer, THINKING, True)
    return folder


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An evaluation that nothing interrupted."""
    return run(model, tmp_path_factory.mktemp("whole") / "whole")


def values(out, **changes):
    base = {
        "dataset": "chain_sum", "dataset_options": OPTIONS, "eval_problems": PROBLEMS, "eval_samples": SAMPLES,
        "eval_batch_size": 8, "output_dir": str(out), "attn_implementation": "float64",
    }  # fmt: skip
    return {key: value for key, value in {**base, **changes}.items() if value is not None}


def run(model, out, **changes):
    return eval_command.run(str(model), values(out, **changes))


def yaml_words(given):
    return [f"--{key}={yaml.safe_dump(v, default_flow_style=True).split(chr(10))[0]}" for key, v in given.items()]


def command(model, out, **changes):
    return ["-m", "rl_soft", "eval", str(model), *yaml_words(values(out, **changes))]


def read(folder):
    return {(r["problem_id"], r["sample"]): r for r in records.read(folder / "records.jsonl")}


def assert_same_records(folder, whole):
    """Each (problem, sample) once, and all else equal; weights but for the rounding of their last digit."""
    ours, theirs = (records.read(path / "records.jsonl") for path in (folder, whole))
    assert len(ours) == len({(r["problem_id"], r["sample"]) for r in ours})
    by_key = {(r["problem_id"], r["sample"]): r for r in theirs}
    assert len(ours) == len(theirs)
    for row in ours:
        other = dict(by_key[row["problem_id"], row["sample"]])
        for a, b in zip(row.pop("thought_tokens"), other.pop("thought_tokens"), strict=True):
            assert {token: pytest.approx(weight, abs=0.0021) for token, weight in a} == dict(b)
        assert row == other


# What is written


def test_an_evaluation_is_n_samples_and_a_greedy_one_with_a_report(whole):
    found = read(whole)
    assert len(found) == PROBLEMS * (SAMPLES + 1)
    assert {sample for _, sample in found} == {records.GREEDY, *range(SAMPLES)}
    assert len({row["seed"] for row in found.values() if row["sample"] >= 0}) == PROBLEMS * SAMPLES
    assert len({row["text"] for row in found.values()}) > PROBLEMS, "samples differ"
    for name in ("report.md", "report.json", "report.html", "passk.csv", "passk.png"):
        assert (whole / name).stat().st_size > 0
    header = records.read_header(whole)
    assert header["decoder"] == THINKING.to_dict()
    assert header["config"]["eval_samples"] == SAMPLES
    assert json.loads((whole / "report.json").read_text())["partial"] == []


def test_records_hold_the_strongest_tokens_of_every_thought(whole):
    vocabulary = {"<pad>", "<unk>", "<eos>", "<bot>", "<eot>", *VOCABULARY}
    for row in read(whole).values():
        assert len(row["thought_tokens"]) == row["thoughts"] == 3
        for thought in row["thought_tokens"]:
            tokens, weights = zip(*thought, strict=True)
            assert set(tokens) <= vocabulary and len(thought) <= 3
            assert list(weights) == sorted(weights, reverse=True)
            assert sum(weights) == pytest.approx(1, abs=0.003)
    data = re.search(r'id="data">(.*?)</script>', (whole / "report.html").read_text(), re.S)[1]
    shown = json.loads(data)["problems"][0]["evaluations"][0]["completions"][0]
    assert shown["tokens"] == read(whole)[json.loads(data)["problems"][0]["id"], shown["sample"]]["thought_tokens"]


@pytest.mark.parametrize("thought", ["token", "soft"])
def test_each_setting_of_the_thinking_can_be_changed(model, whole, tmp_path, thought):
    out = run(model, tmp_path / "out", thought=thought, num_thoughts=2, thought_tau=0.1, eval_samples=2)
    found = read(out)
    assert {row["thoughts"] for row in found.values()} == {2}
    most = max(weight for row in found.values() for t in row["thought_tokens"] for _, weight in t)
    assert (most == 1.0) == (thought == "token")
    assert records.read_header(out)["decoder"]["num_thoughts"] == 2
    seeds = {key: row["seed"] for key, row in read(whole).items()}
    assert all(seeds[key] == row["seed"] for key, row in found.items()), "decoders meet the same noise"


def test_a_plain_model_thinks_in_the_explicit_phase(tmp_path):
    made = tiny_policy("gpt2")
    made.model.save_pretrained(tmp_path / "plain")
    made.tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="end_of_thinking must be a text when phase is explicit"):
        run(tmp_path / "plain", tmp_path / "out")
    explicit = {"end_of_thinking": "=", "num_thoughts": 5, "eval_samples": 2, "max_answer_tokens": 3}
    soft = read(run(tmp_path / "plain", tmp_path / "soft", **explicit))
    assert all(len(row["thought_tokens"]) == row["thoughts"] <= 5 for row in soft.values())
    hard = read(run(tmp_path / "plain", tmp_path / "hard", thought="token", **explicit))
    assert not any("thought_tokens" in row for row in hard.values()), "the text shows them"


def test_a_peft_folder_is_a_model(model, tmp_path):
    """Evaluated with its adapter in the weights, it answers as it does with the adapter beside them."""
    from peft import LoraConfig, get_peft_model

    made = policy.load_policy(str(model))
    bot = made.tokenizer.convert_tokens_to_ids("<bot>")
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False, trainable_token_indices=[bot]
    )
    adapted = get_peft_model(made.model, config)
    policy.save(tmp_path / "adapter", adapted.save_pretrained, made.tokenizer, THINKING, True)
    assert not (tmp_path / "adapter/model.safetensors").exists()
    merged = read(run(tmp_path / "adapter", tmp_path / "out", eval_samples=2))
    assert len(merged) == PROBLEMS * 3
    loaded = policy.load_policy(str(tmp_path / "adapter"), attn_implementation="float64")
    rows = {row.id: row for row in load("chain_sum", "evaluation", PROBLEMS, 2, OPTIONS)}
    tasks = [(rows[problem], sample) for problem, sample in merged if sample != records.GREEDY]
    layout = Layout(THINKING, loaded.tokenizer)
    for beside in evaluate.sample_records(loaded.model.eval(), layout, tasks, seed=7):
        assert merged[beside["problem_id"], beside["sample"]]["text"] == beside["text"]


# Interrupted and shared out


def test_the_same_command_again_draws_nothing(model, whole, monkeypatch):
    before = (whole / "records.jsonl").read_bytes()
    monkeypatch.setattr(evaluate, "rollout", lambda *_: pytest.fail("a sample was drawn again"))
    run(model, whole)
    assert (whole / "records.jsonl").read_bytes() == before


def test_what_is_missing_is_drawn_and_nothing_else(model, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    lines = (whole / "records.jsonl").read_text().splitlines(keepends=True)
    kept = random.Random(0).sample(lines, 17)
    (out / "records.jsonl").write_text("".join(kept) + lines[0][:100])
    (out / "eval.json").write_bytes((whole / "eval.json").read_bytes())
    run(model, out, eval_batch_size=3)
    assert (out / "records.jsonl").read_text().startswith("".join(kept))
    assert_same_records(out, whole)


def kill_at_random(start, path, moments):
    """Starts a process again and again and kills it a random moment after it wrote something."""
    for moment in moments:
        size = path.stat().st_size if path.exists() else 0
        process = start()
        deadline = time.time() + 200
        while time.time() < deadline and process.poll() is None:
            if path.exists() and path.stat().st_size > size:
                break
            time.sleep(0.002)
        time.sleep(moment)
        assert process.poll() is None, "it was to be killed while it works"
        process.kill()
        process.wait()


class Forked:
    """A forked copy of this process that evaluates: nothing has to be imported again."""

    def __init__(self, model, out, **changes):
        self.process = multiprocessing.get_context("fork").Process(target=run, args=(model, out), kwargs=changes)
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)

    def wait(self):
        self.process.join()


def test_killed_five_times_it_holds_each_sample_once(model, tmp_path):
    big = {"eval_problems": 40, "eval_samples": 24, "eval_batch_size": 16}
    moments = [random.Random(1).uniform(0, 0.15) for _ in range(5)]
    out = tmp_path / "out"
    kill_at_random(lambda: Forked(model, out, **big), out / "records.jsonl", moments)
    partial = len(records.read(out / "records.jsonl"))
    assert 0 < partial < 40 * 25, "the kills came in the middle"
    run(model, out, **big)
    assert_same_records(out, run(model, tmp_path / "whole", **big))


def launched(model, out, stage, processes=2, **changes):
    config = str(ROOT / f"recipes/accelerate/{stage}.yaml")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
    words = [sys.executable, *launcher, "--main_process_port", "0", *command(model, out, **changes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return words, environment


@pytest.mark.parametrize("stage", ["ddp", pytest.param("zero3", marks=pytest.mark.slow)])
def test_two_processes_write_the_records_of_one_in_the_same_order(model, whole, tmp_path, stage):
    if stage != "ddp":
        pytest.importorskip("deepspeed")
    words, environment = launched(model, tmp_path / "out", stage)
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 process(es)" in done.stderr
    assert_same_records(tmp_path / "out", whole)
    order = [
        [(r["problem_id"], r["sample"]) for r in records.read(f / "records.jsonl")] for f in (tmp_path / "out", whole)
    ]
    assert order[0] == order[1]
    assert json.loads((tmp_path / "out/report.json").read_text())["num_problems"] == PROBLEMS


@pytest.mark.slow
def test_two_processes_killed_five_times_write_the_records_of_one(model, tmp_path):
    big = {"eval_problems": 60, "eval_samples": 60, "eval_batch_size": 16}
    out = tmp_path / "out"

    def start():
        words, environment = launched(model, out, "ddp", **big)
        launcher = subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        one = launcher.kill

        def kill():
            for process in psutil.Process(launcher.pid).children(recursive=True):
                process.kill()
            one()

        launcher.kill = kill
        return launcher

    moments = [random.Random(2).uniform(0, 0.5) for _ in range(5)]
    kill_at_random(start, out / "records.jsonl", moments)
    assert 0 < len(records.read(out / "records.jsonl")) < 60 * 61
    run(model, out, **big)  # and one process goes on
    assert_same_records(out, run(model, tmp_path / "whole", **big))


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_seed": 8}, "eval_seed = 7, this one has 8"),
        ({"eval_samples": 9}, "eval_samples = 5, this one has 9"),
        ({"eval_problems": 7}, "eval_problems = 6, this one has 7"),
        ({"thought": "soft"}, "thought = 'gumbel', this one has 'soft'"),
        ({"thought_tau": 0.25, "temperature": 0.5}, "temperature = 1.0, this one has 0.5"),
        ({"dataset_options": {**OPTIONS, "max_terms": 5}}, "dataset_options = .*this one has .*5"),
        ({"data_seed_eval": 3}, "data_seed_eval = 2, this one has 3"),
        ({"dtype": "bfloat16"}, "dtype = 'float32', this one has 'bfloat16'"),
    ],
)
def test_another_configuration_is_refused_by_the_first_key_that_differs(model, whole, changes, message):
    before = (whole / "records.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"whole holds an evaluation with {message}"):
        run(model, whole, **changes)
    assert (whole / "records.jsonl").read_bytes() == before


def test_a_batch_size_is_no_configuration(model, whole):
    assert run(model, whole, eval_batch_size=64, eval_k=[1, 4]) == whole
    assert [row["k"] for row in json.loads((whole / "report.json").read_text())["evaluations"][0]["pass_at_k"]] == [
        1,
        4,
    ]


def test_the_report_is_rebuilt_as_it_was(model, tmp_path):
    out = run(model, tmp_path / "out", eval_k=[1, 3])
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for name in ("report.json", "report.md", "report.html", "passk.csv", "passk.png"):
        (out / name).unlink()
    cli.main(["report", str(out)])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_directory_with_other_things_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
        run(model, tmp_path)


def test_records_of_other_questions_are_refused(model, whole, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "eval.json").write_bytes((whole / "eval.json").read_bytes())
    first = records.read(whole / "records.jsonl")[0]
    (out / "records.jsonl").write_text(json.dumps({**first, "question_hash": "0" * 16}) + "\n")
    with pytest.raises(ValueError, match=f"holds problem {first['problem_id']}.* asks another question"):
        run(model, out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_sample": 4}, "eval knows no --eval_sample; did you mean --eval_samples"),
        ({"thought_kay": 4}, "did you mean --thought_k"),
        ({"model_name_or_path": "gpt2"}, "model_name_or_path is the first argument of eval"),
        ({"eval_samples": 0}, "eval_samples must be at least 1, got 0"),
        ({"eval_samples": "many"}, "eval_samples must be a whole number, at least 1, got 'many'"),
        ({"thought": "gumble"}, "thought must be one of .*, got 'gumble'"),
        ({"dtype": "float31"}, "dtype must be one of float32.*got 'float31'"),
        ({"dataset": None}, "dataset is missing"),
        ({"dataset": "chian_sum"}, "unknown data source 'chian_sum'; did you mean chain_sum"),
        ({"eval_problems": None}, r"size \(train_size, eval_problems\) must say how many rows"),
        ({"dataset": "arc_agi", "dataset_options": None, "eval_problems": 1}, "the scorer of arc_agi cannot be used"),
        ({"thought_k": 1000}, "thought_k must be at most the vocabulary size"),
    ],
)
def test_a_mistake_names_the_field_and_the_way_out(model, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(model, tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def test_a_text_on_the_command_line_stays_one():
    parsed = parse_overrides(
        ["--end_of_thinking", "####", "--answer_prompt==", "--step_separator", ": ", "--seed", "3"]
    )
    assert parsed == {"end_of_thinking": "####", "answer_prompt": "=", "step_separator": ": ", "seed": 3}
    assert parse_overrides(["--system_prompt", "null", "--eval_k", "[1, 2]"]) == {
        "system_prompt": None,
        "eval_k": [1, 2],
    }


def test_the_command_line_takes_the_same_keys(model, tmp_path, capsys):
    words = command(model, tmp_path / "out", eval_samples=1, eval_problems=2)[2:]
    cli.main(words)
    assert len(read(tmp_path / "out")) == 4
    cli.main(["check", *words, "--thought", "soft"])
    checked = yaml.safe_load(capsys.readouterr().out)
    assert (checked["eval_samples"], checked["thought"], checked["num_thoughts"]) == (1, "soft", 3)
    elsewhere = ["--end_of_thinking", "=", "--output_dir", str(tmp_path / "elsewhere")]
    for arguments, message in (
        (["eval"], "eval needs MODEL as its first argument"),
        (["evall"], "No such command 'evall'. Did you mean 'eval'"),
        ([*words, "--eval_sampels", "3"], "did you mean --eval_samples"),
        (["eval", "nowhere/else", *words[2:]], "no folder 'nowhere/else' is here"),
        (["eval", "nowhere/else", *words[2:], *elsewhere], "neither a folder here nor to be had"),
        (["eval", "./nowhere", *words[2:], *elsewhere], "model folder ./nowhere does not exist"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and message in error, error


# Golds, puzzles and programs


def test_an_unreadable_gold_is_named_before_any_model_work(tmp_path):
    file = tmp_path / "words.jsonl"
    good, bad = ({"id": i, "question": f"Which is {i}?", "answer": a} for i, a in (("q1", "Berlin"), ("q2", "...")))
    file.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    message = r"dataset .*words.jsonl, row words/q2: the gold answer '\.\.\.' cannot be read \(answer_type free\)"
    words = {"dataset": str(file), "dataset_options": {"answer_type": "free"}}
    with pytest.raises(ValueError, match=message):
        run("no/model", tmp_path / "out", eval_problems=None, end_of_thinking="=", **words)
    assert [row.id for row in load(str(file), "train", options={"drop": ["words/q2"]})] == ["words/q1"]
    recipe = {
        "method": "codi", "model_config": {**TINY, "model_type": "llama"}, "vocabulary": "a", "eval_problems": 0,
        "output_dir": str(tmp_path / "codi"), **words,
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=message):
        train.run(load_recipe(tmp_path / "r.yaml"))
    assert not (tmp_path / "codi").exists()


def test_puzzles_are_judged_by_their_own_scorers():
    task, metadata = "countdown", json.dumps({"numbers": [2, 3, 4], "target": 14})
    row = Row("countdown/1", "Make 14 of 2, 3, 4", (), "2 + 3*4", "free", task, None, metadata)
    texts = [
        "3*4 + 2",
        "So <answer>4*3+2</answer>.",
        "First 12, and then\n2 + 4*3",
        "2 + 3 + 4",
        "14",
        "",
        "open('x')",
    ]
    judged = judging.judge_rows(texts, [row] * len(texts))
    expected = ["correct", "correct", "correct", "wrong", "wrong", "unparsed", "unparsed"]
    assert [judgement.outcome for judgement in judged] == expected
    assert judged[1].prediction == "4*3+2"


def test_kinds_of_rows_may_be_mixed():
    def row(answer, kind, source="file", metadata=""):
        return Row(f"{source}/{answer}", "?", (), answer, kind, source, None, metadata)

    puzzle = load("countdown", "evaluation", 1)[0]
    program = row("assert f(2) == 4", "code")
    rows = [row("12", "number"), puzzle, row("B", "choice"), program, row("12", "number")]
    texts = ["It is 12.", puzzle.answer, "(A)", "def f(x):\n    return x * x\n", "13"]
    outcomes = [judgement.outcome for judgement in judging.judge_rows(texts, rows, run_code=True)]
    assert outcomes == ["correct", "correct", "wrong", "correct", "wrong"]
    with pytest.raises(ValueError, match="confirm_run_unsafe_code is not set"):
        judging.judge_rows(texts, rows)


def test_programs_are_run_only_when_that_is_confirmed(model, tmp_path):
    file = tmp_path / "mbpp.jsonl"
    task = {"task_id": 11, "text": "Write a function f that squares.", "test_list": ["assert f(2) == 4"]}
    file.write_text(json.dumps(task) + "\n")
    programs = {"dataset": "mbpp", "dataset_options": {"path": str(file)}, "eval_problems": None, "eval_samples": 2}
    with pytest.raises(ValueError, match=r"graded by running the programs .* --confirm_run_unsafe_code"):
        run("no/model", tmp_path / "out", end_of_thinking="=", **programs)
    found = read(run(model, tmp_path / "out", confirm_run_unsafe_code=True, **programs))
    assert {row["outcome"] for row in found.values()} <= {"wrong", "unparsed"} and len(found) == 3


# -- like another evaluation


def test_an_evaluation_like_another_one_pairs_with_it(model, whole, tmp_path):
    out = eval_command.run(str(model), {"like": str(whole), "output_dir": str(tmp_path / "out")})
    assert_same_records(out, whole)
    other = load_command("eval", "m", {"like": str(whole), "output_dir": "o", "thought_tau": 0.1, "dataset": "gsm8k"})
    arguments, changes, _ = other
    assert changes["thought_tau"] == 0.1 and changes["num_thoughts"] == THINKING.num_thoughts
    assert (arguments.dataset, arguments.dataset_options, arguments.eval_problems) == ("gsm8k", None, None)
    with pytest.raises(ValueError, match=r"neither a run .* nor an evaluation"):
        load_command("eval", "m", {"like": str(tmp_path), "output_dir": "o"})


def test_an_evaluation_like_a_run_takes_its_held_out_problems(tmp_path):
    run = {
        "method": "grpo",
        "dataset": "a.jsonl",
        "dataset_columns": {"question": "q"},
        "eval_dataset": "b.jsonl",
        "eval_dataset_options": {"holdout": True},
        "eval_problems": 0,
        "eval_seed": 3,
        "thought_tau": 0.3,
        "question_template": "Q: {question}",
        "learning_rate": 1.0,
        "phase": "explicit",
        "end_of_thinking": "#",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    with pytest.raises(ValueError, match="has eval_problems 0; say how many: --eval_problems N"):
        load_command("eval", "m", {"like": str(tmp_path), "output_dir": "o"})
    arguments, changes, _ = load_command("eval", "m", {"like": str(tmp_path), "output_dir": "o", "eval_problems": 9})
    assert (arguments.dataset, arguments.dataset_options, arguments.dataset_columns) == (
        "b.jsonl",
        {"holdout": True},
        None,
    )
    assert (arguments.eval_problems, arguments.eval_seed) == (9, 3)
    assert changes == {k: run[k] for k in ("thought_tau", "question_template", "phase", "end_of_thinking")}


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_run_s_folder_means_its_model(model, tmp_path, command, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{}")
    words = {"eval": yaml_words(values(tmp_path / "out", eval_problems=2, eval_samples=1)),
             "generate": ["--prompt", "1+1="]}[command]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main([command, str(run), *words])
    assert "has no model yet" in capsys.readouterr().err
    (run / "model").symlink_to(model)
    cli.main([command, str(run), *words])
    if command == "eval":
        assert records.read_header(tmp_path / "out")["model"] == str(run / "model")
