"""`rl_soft.generate`, `rl-soft generate` and `rl-soft eval --thoughts`: the same decoders, addressed the same way.

pytest tests/cli/test_generate.py
"""

import io
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, rows, tiny_policy
from rich.console import Console
from test_decoding import make

import rl_soft
from rl_soft import cli
from rl_soft.cli import generate as generate_command
from rl_soft.cli import terminal
from rl_soft.config.reading import parse_overrides
from rl_soft.evaluation import generation, records
from rl_soft.evaluation import samples as evaluate
from rl_soft.evaluation.generation import Completion, Mixture, Task, complete, layout_for
from rl_soft.evaluation.records import GREEDY
from rl_soft.model import policy
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.decoding import Decoding
from rl_soft.thoughts.layout import Layout, check_texts, tell_template
from rl_soft.thoughts.thinking import Thinking

THINKING = Thinking(
    phase="explicit", end_of_thinking="=", num_thoughts=9, thought_k=3, thought_temperature=1.3, max_answer_tokens=5
)
QUESTIONS = [row.question for row in rows(6)]
CUT = Decoding(top_k=8, top_p=0.95, after_top_k=4, cold_stop_entropy=2.3, cold_stop_length=3)


def call(made, questions=QUESTIONS, thinking=THINKING, **kwargs):
    return rl_soft.generate(made.model, made.tokenizer, questions, thinking=thinking, **kwargs)


def assert_same(ours: Completion, theirs: Completion) -> None:
    """Equal, but for the rounding of numbers."""
    a, b = ours.to_dict(), theirs.to_dict()
    for x, y in zip(a.pop("thoughts"), b.pop("thoughts"), strict=True):
        assert x["ids"] == y["ids"] and x["tokens"] == y["tokens"]
        for name in ("weights", "entropy", "outside"):
            assert x[name] == pytest.approx(y[name], abs=1e-4)
    assert a == b


# From Python


@pytest.mark.parametrize(
    ("kind", "thought"),
    [(kind, "gumbel") for kind in ("llama", "gpt2", "qwen3", "gemma2")]
    + [("llama", thought) for thought in ("token", "soft", "dirichlet")],
)
def test_batch_1_is_batch_16_and_other_prompts_change_nothing(kind, thought):
    made, thinking = make(kind), replace(THINKING, thought=thought)
    together = call(made, thinking=thinking, decoding=CUT, samples=2, batch_size=16)
    alone = call(made, thinking=thinking, decoding=CUT, samples=2, batch_size=1)
    for several, single in zip(together, alone, strict=True):
        for a, b in zip(several, single, strict=True):
            assert_same(a, b)
    assert_same(call(made, QUESTIONS[4:5], thinking, decoding=CUT, ids=["4"])[0][0], together[4][0])
    assert len({c.text for several in together for c in several}) > 6


@pytest.mark.parametrize("phase", ["explicit", "latent"])
def test_a_completion_says_what_an_evaluation_records(phase):
    made, thinking = tiny_policy(), replace(THINKING, phase=phase, answer_prompt="#")
    layout, problems = Layout(thinking, made.tokenizer), rows(4)
    made.model.eval()
    for greedy in (False, True):
        tasks = [(row, GREEDY if greedy else sample) for row in problems for sample in range(1 if greedy else 2)]
        expected = evaluate.sample_records(made.model, layout, tasks, seed=7, decoding=CUT)
        questions, names = [row.question for row in problems], [row.id for row in problems]
        found = call(
            made, questions, thinking, decoding=CUT, seed=7, samples=1 if greedy else 2, greedy=greedy, ids=names
        )
        for done, record in zip([c for several in found for c in several], expected, strict=True):
            assert (done.prompt_id, done.sample, done.seed) == (
                record["problem_id"],
                record["sample"],
                record["seed"],
            )
            assert (done.text, len(done.thoughts)) == (record["text"], record["thoughts"])
            assert (len(done.answer_ids), done.finished) == (record["answer_tokens"], not record["truncated"])
            for mixture, recorded in zip(done.thoughts, record["thought_tokens"], strict=True):
                assert mixture.tokens[: len(recorded)] == [token for token, _ in recorded]
                assert mixture.weights[: len(recorded)] == pytest.approx([w for _, w in recorded], abs=1e-3)
            fed = [layout.eot_id, *layout.answer_prompt_ids] if phase == "latent" else None
            if fed:
                assert done.ids == [layout.bot_id] * len(done.thoughts) + fed + done.answer_ids


def test_every_way_to_end_is_named():
    made = make()
    seen = set()
    for decoding in (None, Decoding(cold_stop_entropy=2.6, cold_stop_length=2)):
        for several in call(made, thinking=replace(THINKING, num_thoughts=7), samples=8, decoding=decoding):
            for done in several:
                seen.add(done.thinking_end)
                n, strongest = len(done.thoughts), [mixture.ids[0] for mixture in done.thoughts]
                assert done.thought_text == made.tokenizer.decode(strongest, skip_special_tokens=True)
                if done.thinking_end == "end":
                    assert done.thought_text.endswith("=") and len(done.ids) == n + len(done.answer_ids)
                elif done.thinking_end == "eos":
                    assert strongest[-1] == made.tokenizer.eos_token_id and not done.answer_ids and done.finished
                else:
                    assert (n == 7) == (done.thinking_end == "cap") and done.text[len(done.thought_text)] == "="
                    assert n >= 2
    assert seen == {"end", "eos", "cap", "cold"}
    with torch.no_grad():
        made.model.lm_head.weight[3] = float("nan")
    assert {several[0].thinking_end for several in call(made)} == {"failed"}


def test_the_state_of_the_model_and_the_noise_are_left_alone():
    made = make()
    made.model.train()
    before = torch.get_rng_state()
    first, second = call(made, samples=2), call(made, samples=2)
    assert made.model.training and torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert [s[0].text for s in call(made, seed=1)] != [s[0].text for s in first]
    assert call(made, []) == []


def test_positions_are_streamed_as_they_are_in_the_end():
    made, layout = make(), Layout(THINKING, make().tokenizer)
    tasks = [Task(str(i), question, 0) for i, question in enumerate(QUESTIONS)]
    for task in tasks:
        seen: list[tuple[str, Mixture]] = []
        done: list[Completion] = []
        complete(made.model, layout, [task], CUT, 0, 1, done.append, lambda *p, seen=seen: seen.append(p))
        assert_same(done[0], call(made, decoding=CUT)[int(task.id)][0])
        assert [m for kind, m in seen if kind == "thought"] == done[0].thoughts
        assert [m.ids[0] for _, m in seen] == done[0].ids
        assert [m.ids[0] for kind, m in seen if kind == "answer"] == done[0].answer_ids
    order: list[str] = []
    complete(made.model, layout, tasks, CUT, 0, 4, lambda c: order.append(c.prompt_id))
    assert order == [task.id for task in tasks]


def test_watching_changes_nothing_and_tells_who_is_done():
    """Few rows fit, so that some wait while others are done."""
    made, layout = make(), Layout(THINKING, make().tokenizer)
    prompts = [layout.prompt_ids(question) for question in QUESTIONS]
    seeds, ends = torch.arange(6) + 5, [made.tokenizer.eos_token_id]
    looks = []

    def look(out, done):
        looks.append(done.clone())
        for row in done.nonzero()[:, 0].tolist():
            n = int(out.mask[row].sum())
            assert n == int(plain.lengths[row]) and torch.equal(out.support[row, :n], plain.support[row, :n])

    plain = rollout(made.model, layout, prompts, seeds, ends, token_budget=80)
    watched = rollout(made.model, layout, prompts, seeds, ends, token_budget=80, watch=look)
    assert all(
        torch.equal(x, getattr(watched, name)) for name, x in vars(plain).items() if isinstance(x, torch.Tensor)
    )
    counts = [int(done.sum()) for done in looks]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == 6 and len(set(counts)) > 3


@pytest.mark.parametrize(
    ("changes", "kwargs", "message"),
    [
        ({"end_of_thinking": "</think>"}, {}, "end_of_thinking '</think>' cannot be produced by this tokenizer"),
        ({"thought_k": 99}, {}, "thought_k must be at most the vocabulary size 20, got 99"),
        ({"system_prompt": "Be brief."}, {}, "system_prompt 'Be brief.' needs a chat template, and the tokenizer has"),
        ({"system_prompt": "1", "phase": "latent"}, {}, "system_prompt '1' needs a chat template, and phase latent"),
        ({}, {"questions": ["1+2=", ""]}, "prompt 1 is empty"),
        ({"thought": "hybrid", "phase": "latent"}, {}, "thought hybrid needs a model with a projector"),
        ({"num_thoughts": 125}, {}, r"prompt 0 has \d+ tokens; .* over the model's 128 positions: .*num_thoughts"),
        ({}, {"samples": 0}, "samples must be at least 1, got 0"),
        ({}, {"samples": 2, "greedy": True}, "samples must be 1 where greedy is true, got 2"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1"),
        ({}, {"ids": ["a"] * 6}, "ids must be 6 different names"),
        ({}, {"questions": "1+2="}, "prompts must be a list of texts, got one text"),
    ],
)
def test_what_cannot_be_is_refused(changes, kwargs, message):
    with pytest.raises(ValueError, match=message):
        call(make(), thinking=replace(THINKING, **changes), **kwargs)
    for name in ("thought_tau", "thought_gamma"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
            replace(THINKING, **{name: 0})


def test_a_model_without_a_chat_template_is_asked_plainly(caplog):
    made = make()
    with caplog.at_level("INFO", logger="rl_soft"):
        layout = layout_for(made.model, made.tokenizer, THINKING)
        tell_template(layout)
    assert "no chat template" in caplog.text
    assert layout.prompt_ids("1+2=") == made.tokenizer.encode("1+2=")
    caplog.clear()
    made.tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] ~ m.content }}{% endfor %}"
    with_system = Layout(replace(THINKING, system_prompt="1"), made.tokenizer)
    check_texts(with_system)
    tell_template(with_system)
    assert not caplog.text
    made.tokenizer.chat_template = "{{ raise_exception('no system role') }}"  # as Gemma's says
    with pytest.raises(ValueError, match="system_prompt '1': the tokenizer's chat template says 'no system role'"):
        check_texts(with_system)


def test_the_package_costs_nothing_until_it_is_asked():
    code = "import sys, rl_soft; rl_soft.Thinking, rl_soft.Decoding; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
    with pytest.raises(AttributeError, match="no attribute 'generator'"):
        _ = rl_soft.generator
    assert rl_soft.generate is generation.generate


# In the terminal


def test_pieces_are_whole_characters_and_add_up():
    text = "aä漢🙂 z"
    data = text.encode()
    pieces = terminal.Pieces(lambda ids: bytes(ids).decode(errors="replace"))
    found = [pieces.add(byte) for byte in data]
    assert "".join(found) == text and [f for f in found if f] == list(text)


def shown(made, show=3, color=False, **kwargs):
    file = io.StringIO()
    console = Console(file=file, force_terminal=color, color_system="256" if color else None, soft_wrap=True)
    screen = terminal.Terminal(terminal.decoder(made.tokenizer), show, "=", console)
    for several in call(made, **kwargs):
        for done in several:
            screen.whole(done)
    return file.getvalue()


def test_a_line_a_thought_shows_its_entries_and_its_entropy():
    made = make()
    done = call(made)[0][0]
    lines = shown(made).splitlines()
    assert lines[0] == f"[0, sample 0] {QUESTIONS[0]}"
    for number, mixture in enumerate(done.thoughts, start=1):
        words = lines[number].split()
        assert words[:3] == [str(number), f"{mixture.entropy:.2f}", "nats"]
        heard = [(token, w) for token, w in zip(mixture.tokens, mixture.weights, strict=True) if w >= 0.005]
        assert words[3::2] == [token for token, _ in heard]
        assert [float(w) for w in words[4::2]] == pytest.approx([w for _, w in heard], abs=0.0051)
    assert len(shown(made, show=1).splitlines()[1].split()) == 5
    assert f"{len(done.thoughts)} thought" in shown(made)
    running = shown(made, show=0)
    assert done.thought_text.replace("<eos>", "") in running.splitlines()[1]
    assert done.answer in running


def test_positions_whose_logits_are_not_finite_are_told_and_shift_nothing(capsys):
    made = make()
    done = next(several[0] for several in call(made) if len(several[0].answer_ids) == 5)
    failed = replace(done, ids=[*done.ids, made.tokenizer.pad_token_id], finished=False)  # after the answer's fifth
    console = Console(soft_wrap=True)
    for one in (replace(done, finished=False), failed, replace(failed, thoughts=[], ids=[0], answer_ids=[])):
        one = one if one.thoughts else replace(one, thinking_end="failed")
        terminal.Terminal(terminal.decoder(made.tokenizer), 3, "=", console).whole(one)
    whole, shown_failed, none = capsys.readouterr().out.split("[0, sample 0] ")[1:]
    assert shown_failed == whole and done.answer in whole
    assert "0 thoughts, ended by logits that are not finite, 0 answer tokens, cut off" in none


def test_a_certain_thought_has_no_negative_entropy():
    for several in call(make(), thinking=replace(THINKING, thought_temperature=1e-6)):
        assert all(str(mixture.entropy) == "0.0" for mixture in several[0].thoughts)


def test_colours_follow_the_entropy_and_no_control_character_gets_out():
    assert "\x1b" not in shown(make())
    assert "\x1b[" in shown(make(), color=True)
    names = [terminal.colour(e) for e in (0.0, 0.3, 0.7, 1.5, 9.0, float("nan"))]
    assert names == ["green", "cyan", "yellow", "magenta", "red", "red"]
    assert terminal.visible(" a\x1b[31m\n ") == "␣a\\x1b[31m\\n␣"
    assert terminal.printable("a\x1b[2J\nb\x07") == "a\\x1b[2J\nb\\x07"


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    made = tiny_policy()
    policy.save(folder, made.model.save_pretrained, made.tokenizer, THINKING, True)
    return folder


def command(model, *words):
    cli.main(["generate", str(model), *map(str, words)])


def test_json_is_all_there_is_on_stdout_and_a_prompt_is_text_as_it_stands(model, capfd):
    command(model, "--prompt", "1: 2", "--json", "--samples", "3")
    found = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [(c["prompt"], c["sample"]) for c in found] == [("1: 2", i) for i in range(3)]
    assert found[0]["settings"]["thought_k"] == 3 and found[0]["settings"]["top_k"] == 0
    assert {"thoughts", "answer", "thinking_end", "finished"} <= found[0].keys()


def test_the_command_streams_one_completion_and_prints_several(model, capsys):
    command(model, "--prompt", "3+4=", "--show", "2")
    one = capsys.readouterr().out
    command(model, "--prompt", "3+4=", "--samples", "2", "--show", "2")
    two = capsys.readouterr().out
    assert "\x1b" not in one + two
    assert one.splitlines()[0] == "3+4=" and two.splitlines()[0] == "[0, sample 0] 3+4="
    assert one.splitlines()[1:] == two.split("\n\n[0, sample 1]")[0].splitlines()[1:]


def test_a_stopped_run_goes_on_and_repeats_no_sample(model, tmp_path, monkeypatch, caplog):
    questions = tmp_path / "questions.txt"
    questions.write_text("\n\n".join(QUESTIONS) + "\n")
    words = [
        "--prompts",
        questions,
        "--samples",
        "3",
        "--batch_size",
        "4",
        "--json",
        "--thought_tau",
        "0.3",
        "--output",
    ]
    command(model, *words, tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_text()
    assert len(whole.splitlines()) == 18

    out, append, made = tmp_path / "out" / "part.jsonl", generate_command.Output.add, []

    def stop(self, done):
        append(self, done)
        made.append((done.prompt_id, done.sample))
        if len(made) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(generate_command.Output, "add", stop)
    with pytest.raises(SystemExit) as error:
        command(model, *words, out)
    assert error.value.code == 130 and len(out.read_text().splitlines()) == 7
    with out.open("a") as file:
        file.write(whole.splitlines()[7][:50])  # what a kill leaves
    command(model, *words, out)
    assert "line 8 is unfinished; leaving it out" in caplog.text and "has 7 of 18 completions" in caplog.text
    assert len(made) == len(set(made)) == 18
    for ours, theirs in zip(out.read_text().splitlines(), whole.splitlines(), strict=True):
        a, b = json.loads(ours), json.loads(theirs)
        assert (a["prompt_id"], a["sample"], a["ids"]) == (b["prompt_id"], b["sample"], b["ids"])
    before = out.read_bytes()
    command(model, *words, out)
    assert out.read_bytes() == before and len(made) == 18
    with out.open("a") as file:
        file.write("a line of something else")
    with pytest.raises(ValueError, match="line 19: not a completion of `rl-soft generate`; choose another file"):
        generate_command.run(str(model), parse_overrides([str(w) for w in [*words, out]]))
    out.write_bytes(before)

    for other, message in (
        (["--thought_tau", "0.4"], "thought_tau = 0.3, this run has 0.4"),
        (["--top_k", "4"], "top_k = 0, this run has 4"),
        (["--seed", "1"], "seed = 0, this run has 1"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_command.run(str(model), parse_overrides([str(w) for w in [*words, out, *other]]))
    questions.write_text("1+1=\n")
    with pytest.raises(ValueError, match="holds another question of the name '0'"):
        generate_command.run(str(model), parse_overrides([str(w) for w in [*words, out]]))
    assert out.read_bytes() == before


def test_questions_come_from_a_file_or_a_data_set(model, tmp_path, capsys):
    file = tmp_path / "q.jsonl"
    file.write_text(
        '\ufeff{"id": "a", "question": "1+2="}\n{"question": "3+4="}\r\n{"id": null, "question": "5\u2028="}\n'
    )
    command(model, "--prompts", file, "--json", "--greedy")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = [(c["prompt_id"], c["prompt"], c["sample"]) for c in found]
    assert asked == [("a", "1+2=", -1), ("1", "3+4=", -1), ("2", "5\u2028=", -1)]
    options = "{min_terms: 2, max_terms: 4, compact: true}"
    data = ["--dataset", "chain_sum", "--dataset_options", options, "--eval_problems", "4"]
    command(model, *data, "--json", "--seed", "7", "--samples", "2")
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cli.main(["eval", str(model), *data, "--eval_samples", "2", "--output_dir", str(tmp_path / "eval")])
    recorded = {(r["problem_id"], r["sample"]): r["text"] for r in records.read(tmp_path / "eval" / "records.jsonl")}
    assert [recorded[c["prompt_id"], c["sample"]] for c in found] == [c["text"] for c in found] and len(found) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "generate needs one of --prompt TEXT, --prompts FILE and --dataset NAME, not none of them"),
        (["--prompt", "1", "--dataset", "chain_sum"], "not prompt and dataset"),
        (["--prompt", "1", "--sample", "2"], "generate knows no --sample; did you mean --samples?"),
        (["--prompt", "1", "--topk", "2"], "did you mean --top_k?"),
        (["--prompt", "1", "--top_p", "2"], "top_p must be above 0 and at most 1"),
        (["--prompt", "1", "--thought_tau", "0"], "thought_tau must be above 0, got 0"),
        (["--prompt", "1", "--thought", "dirichlet", "--thought_gamma", "-1"], "thought_gamma must be above 0"),
        (["--prompt", "1", "--thought_k", "21"], "thought_k must be at most the vocabulary size 20, got 21"),
        (["--prompt", "1", "--end_of_thinking", "</think>"], "cannot be produced by this tokenizer"),
        (["--prompt", "1+" * 60], "prompt 0 has 120 tokens"),
        (["--prompt", "1", "--greedy", "--samples", "2"], "samples must be 1 where greedy is true"),
        (["--prompt", "1", "--show", "11"], "show must be between 0 and 10, got 11"),
        (["--prompts", "nowhere.txt"], "prompts nowhere.txt: no such file"),
        (["--prompt", "1\udce9"], r"prompt: '\udce9' at 1 is no Unicode character"),
        (["--prompt", "1", "--output", "/"], "output / cannot be written: Is a directory"),
        (["--prompt", "1", "--output", f"{__file__}/o.jsonl"], "/o.jsonl cannot be written: "),
    ],
)
def test_a_mistake_is_one_line(model, capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        command(model, *words)
    said = capsys.readouterr()
    error = said.err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("rl_soft: error:") and message in error, error
    assert said.out == ""


def test_a_file_that_is_no_list_of_questions_is_refused(tmp_path):
    for name, text, message in (
        ("empty.txt", "\n \n", "holds no question"),
        ("a.jsonl", '{"question": "1"}\n{"answer": 2}\n', "line 2: expected a JSON object with a text `question`"),
        ("b.jsonl", '{"id": 1, "question": "1"}\n{"id": 1, "question": "2"}\n', "line 2: id '1' is there already"),
        ("c.jsonl", '{"question": " "}\n', "line 1: expected a JSON object with a text `question`"),
        ("d.jsonl", '{"question": "\\ud83d"}\n', "line 1: .* is no Unicode character"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            generate_command.read_questions(generate_command.GenerateArguments(prompts=str(tmp_path / name)))


def test_files_of_others_are_left_as_they_are(model, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8: unexpected end of data at byte 0"):
        generate_command.read_questions(generate_command.GenerateArguments(prompts=str(tmp_path / "latin.txt")))
    for text in ('{"my": "document"}', "no line end", '{"a": 1}\n', "[1]\n", '{"prompt_id": "0", "sample": 0}\n'):
        (tmp_path / "o.json").write_text(text)
        with pytest.raises(SystemExit):
            command(model, "--prompt", "1+2=", "--output", tmp_path / "o.json")
        assert "o.json, line 1: not a completion of `rl-soft generate`" in capsys.readouterr().err
        assert (tmp_path / "o.json").read_text() == text


def test_text_values_of_the_command_line_stay_text():
    parsed = parse_overrides(["--prompt", "a: b", "--answer_prompt", "Answer: ", "--seed", "3"], texts=("prompt",))
    assert parsed == {"prompt": "a: b", "answer_prompt": "Answer: ", "seed": 3}


# Evaluations of several kinds


def test_one_command_compares_kinds_on_the_same_problems(model, tmp_path, capsys):
    options = "{min_terms: 2, max_terms: 4, compact: true}"
    words = ["eval", str(model), "--dataset", "chain_sum", "--dataset_options", options, "--eval_problems", "4"]
    words += ["--eval_samples", "2", "--top_k", "6", "--output_dir", str(tmp_path / "out")]
    cli.main([*words, "--thoughts", "gumbel,soft"])
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert [e["name"] for e in report["evaluations"]] == ["token", "gumbel", "soft"]
    assert (out / "passk.png").exists() and (out / "gumbel" / "report.html").exists()
    seeds = [
        {(r["problem_id"], r["sample"]): r["seed"] for r in records.read(out / kind / "records.jsonl")}
        for kind in ("token", "gumbel", "soft")
    ]
    assert seeds[0] == seeds[1] == seeds[2] and len(seeds[0]) == 12
    header = records.read_header(out / "gumbel")
    assert header["decoder"]["top_k"] == header["config"]["top_k"] == 6
    before = {kind: (out / kind / "records.jsonl").read_bytes() for kind in ("token", "gumbel", "soft")}
    cli.main([*words, "--thoughts", "[gumbel, soft, dirichlet]"])  # a kind more; the others are there
    assert {kind: (out / kind / "records.jsonl").read_bytes() for kind in before} == before
    report = json.loads((out / "report.json").read_text())
    assert [e["name"] for e in report["evaluations"]] == ["token", "gumbel", "soft", "dirichlet"]

    single = [*words[:-1], str(out / "gumbel"), "--thought", "gumbel"]
    cli.main(single)  # the folder of a kind is the evaluation of that kind alone
    assert (out / "gumbel" / "records.jsonl").read_bytes() == before["gumbel"]
    for changed, message in (
        ([*single, "--top_k", "5"], "with top_k = 6, this one has 5"),
        ([*words, "--thoughts", "gumbel", "--top_k", "5"], "with top_k = 6, this one has 5"),
        ([*words, "--thoughts", "gumbel,sofd"], "got 'sofd'; did you mean soft?"),
        ([*words, "--thoughts", "token"], "thoughts must name a kind to compare with token"),
        ([*words, "--thoughts", "soft", "--thought", "soft"], "give one of them"),
        ([*words[:-1], str(out / "soft"), "--thoughts", "soft"], "holds an evaluation of one kind of thought"),
        ([*words[:-1], str(tmp_path), "--thoughts", "soft"], "is not empty and holds no evaluation"),
        ([*words[:-1], str(out / "report.md"), "--thoughts", "soft"], "report.md is a file; choose another"),
        ([*words[:-1], str(out / "report.md" / "a")], "report.md is a file; choose another"),
        ([*words[:-1], str(tmp_path / "new"), "--control", "shuffle"], "eval_samples must be 1, got 2"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main(changed)
        error = capsys.readouterr().err
        assert message in error, error
    cli.main(["check", *words, "--thoughts", "gumbel"])
    checked = capsys.readouterr().out
    assert "top_k: 6" in checked and "thoughts:\n- token\n- gumbel" in checked


def test_an_evaluation_made_before_there_was_a_decoding_goes_on(model, tmp_path):
    words = ["eval", str(model), "--dataset", "chain_sum", "--eval_problems", "2", "--eval_samples", "1"]
    words += ["--dataset_options", "{min_terms: 2, max_terms: 4, compact: true}", "--output_dir", str(tmp_path / "e")]
    cli.main(words)
    header = json.loads((tmp_path / "e" / "eval.json").read_text())
    assert "top_k" not in header["decoder"] and "top_k" not in header["config"]
    for key in ("thoughts", "switch", "switch_window", "chat_template"):
        for part in ("config", "decoder"):
            header[part].pop(key, None)
    (tmp_path / "e" / "eval.json").write_text(json.dumps(header))
    cli.main(words)
