"""Probe and cost: the rule on thoughts whose content is known, and what is counted.

pytest tests/analyses/test_probe_and_cost.py
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import rows, tiny_policy

from rl_soft.analyses import cost, probe
from rl_soft.cli import main
from rl_soft.config.commands import AnalysisArguments, EvaluationArguments
from rl_soft.config.recipe import load_command
from rl_soft.data.sources import Row
from rl_soft.evaluation.records import GREEDY
from rl_soft.evaluation.samples import evaluate, sample_records
from rl_soft.model.policy import eos_token_ids
from rl_soft.model.projector import add_projector
from rl_soft.rollouts.engine import rollout
from rl_soft.thoughts.fit import check_lengths
from rl_soft.thoughts.layout import Layout
from rl_soft.thoughts.thinking import Thinking

LATENT = Thinking(thought="soft", thought_k=0, num_thoughts=3, answer_prompt="#", step_separator=";")


def made(thought="soft", model_type="llama"):
    found = tiny_policy(model_type)
    if thought in ("hidden", "hybrid"):
        add_projector(found.model, gated=thought == "hybrid")
    k = 3 if thought in ("gumbel", "hybrid") else 0
    thinking = replace(LATENT, thought=thought, thought_k=k, max_answer_tokens=3)
    return found.model.eval(), Layout(thinking, found.tokenizer)


# -- probe ---------------------------------------------------------------------------------------------------------


def test_intermediate_results_are_the_numbers_after_the_last_equals_sign():
    def results(*steps):
        return probe.intermediate_results(Row("r", "q", steps, "0", "number", "s", None))

    assert results("<<600*30/100=180>>", "<<600-180=420>>", "<<420*2=840>>") == ["180", "420"]
    assert results("7-9=-2", "-2+4=2") == ["-2"]
    assert results("He pays 3 * $400 = $1,200", "so 1200 - 1 = 1199 apples.", "End.") == ["1200", "1199"]
    assert results("x = 2.50 dollars", "last = 9") == ["2.50"]
    assert results("no number here", "last = 9") == [] == results("only = 1")


@pytest.mark.parametrize("thought", ["soft", "gumbel", "hidden", "hybrid"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_the_probe_sees_the_thoughts_of_the_rollout(thought, model_type):
    """The strongest ids of the first n positions are those that the rollout's thoughts recorded."""
    model, layout = made(thought, model_type)
    logits = probe.thought_logits(model, layout, rows(6))
    assert logits.shape[:2] == (6, 4)
    prompts = [layout.prompt_ids(row.question) for row in rows(6)]
    out = rollout(model, layout, prompts, None, eos_token_ids(model, layout.tokenizer))
    assert torch.equal(logits[:, :3].argmax(-1), out.support[:, :3, 0])
    alone = torch.cat([probe.thought_logits(model, layout, [row]) for row in rows(6)])
    torch.testing.assert_close(alone, logits, atol=1e-4, rtol=1e-4)


def test_the_rule_on_thoughts_that_are_known(monkeypatch):
    """A problem whose thoughts spell its results holds them; its neighbour's results are the chance level."""
    model, layout = made()
    some = [
        Row("a", "1+2+4=", ("1+2=3", "3+4=7"), "7", "number", "t", None),
        Row("b", "2+3+1=", ("2+3=5", "5+1=6"), "6", "number", "t", None),
        Row("c", "4+4+1=", ("4+4=8", "8+1=9"), "9", "number", "t", None),
    ]

    def known(model, layout, batch, control="none"):
        logits = torch.zeros(len(batch), 4, len(layout.tokenizer))
        for i, row in enumerate(batch):
            said = {"a": "3", "b": "5", "c": "3"}[row.id]  # c holds a's result instead of its own
            logits[i, 1, layout.encode(said)[0]] = 9.0
            logits[i, (0, 2, 3), layout.bot_id] = 9.0
        return logits

    monkeypatch.setattr(probe, "thought_logits", known)
    found = probe.probe(model, layout, some, [True, True, False], top_k=1, batch_size=2)
    assert [p.held for p in found] == [[True], [True], [False]]
    assert [p.by_chance for p in found] == [[False], [False], [True]], "c's thoughts hold a result of the next, a"
    rates = probe.rates(found)["1"]
    assert rates["results_held"] == pytest.approx(2 / 3) and rates["all_held_by_chance"] == pytest.approx(1 / 3)
    text = probe.report(found, layout, 1, None)
    assert "| correct | 1 | 2 | 100.0% | 0.0% | 100.0% | 0.0% |" in text


def test_a_problem_without_another_like_it_has_no_chance_rate():
    model, layout = made()
    some = [
        Row("a", "1+2+4=", ("1+2=3", "3+4=7"), "7", "number", "t", None),
        Row("b", "1+2+4+1=", ("1+2=3", "3+4=7", "7+1=8"), "8", "number", "t", None),
        Row("c", "2+3+1=", ("2+3=5", "5+1=6"), "6", "number", "t", None),
    ]
    found = probe.probe(model, layout, some, [True] * 3, top_k=20, batch_size=3)
    assert [p.by_chance for p in found] == [[True], None, [True]]
    rates = probe.rates(found)
    assert rates["1"]["results_held_by_chance"] == 1 and rates["2"]["results_held_by_chance"] is None
    assert "| all | 2 | 1 | 100.0% | – | 100.0% | – |" in probe.report(found, layout, 20, None)


def test_the_probe_refuses_what_it_cannot_read():
    model, layout = made()
    with pytest.raises(ValueError, match="no step of these rows but the last"):
        probe.probe(model, layout, [replace(row, steps=()) for row in rows(2)], [True, True], 5, 2)
    explicit = Thinking(thought="token", phase="explicit", num_thoughts=8, end_of_thinking="#")
    with pytest.raises(ValueError, match="probe reads latent thoughts"):
        probe.probe(model, Layout(explicit, layout.tokenizer), rows(2), [True, True], 5, 2)


# -- controls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("thought", ["soft", "hidden"])
def test_a_control_changes_the_thoughts_and_nothing_else(thought):
    """Without thoughts it has no effect; with them zero and repeat act on each row alone, shuffle between rows."""
    model, layout = made(thought)
    tasks = [(row, GREEDY) for row in rows(8)]
    prompts = [layout.prompt_ids(row.question) for row, _ in tasks]
    ends = eos_token_ids(model, layout.tokenizer)

    def log_probs(control, which=slice(None), layout=layout):
        return rollout(model, layout, prompts[which], None, ends, control=control).log_probs

    plain = log_probs("none")
    at = 4  # the first answer token: after 3 thoughts, <eot> and #
    for control in ("zero", "repeat", "shuffle"):
        assert not torch.allclose(log_probs(control)[:, at + 1], plain[:, at + 1], atol=1e-4), control
        without = Layout(replace(layout.thinking, num_thoughts=0), layout.tokenizer)
        assert torch.equal(log_probs(control, layout=without), log_probs("none", layout=without))
    for control in ("zero", "repeat"):
        single = torch.cat([log_probs(control, slice(i, i + 1))[:, at + 1] for i in range(8)])
        torch.testing.assert_close(single, log_probs(control)[:, at + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch,fits", [(4, True), (5, True), (7, False), (1, False)])
def test_no_row_is_shuffled_alone(tmp_path, batch, fits):
    """It would keep its own thoughts, and count as if it had not."""
    model, layout = made("soft")
    told = {"name": "x", "model_name": "m", "dataset": "d", "split": "train", "config": None}
    given = {**told, "samples": 1, "seed": 0, "batch_size": batch, "control": "shuffle"}
    if fits:
        evaluate(model, layout, rows(8), tmp_path, **given)
        return
    with pytest.raises(ValueError, match=f"8 problems in batches of {batch} .* choose another eval_batch_size"):
        evaluate(model, layout, rows(8), tmp_path, **given)
    with pytest.raises(ValueError, match="control shuffle needs at least 2 rows"):
        rollout(model, layout, [layout.prompt_ids("1+1=")], None, [2], control="shuffle")


def test_a_control_is_an_argument_of_eval():
    arguments = {"dataset": "d", "output_dir": "o"}
    assert load_command("eval", "m", {**arguments, "control": "zero"})[0].control == "zero"
    with pytest.raises(ValueError, match="control must be one of none, zero, shuffle, repeat, got 'zeros'"):
        load_command("eval", "m", {**arguments, "control": "zeros"})
    assert EvaluationArguments(model_name_or_path="m", output_dir="o", dataset="d").control == "none"


# -- cost ----------------------------------------------------------------------------------------------------------


def test_reasoning_is_counted_without_the_end_of_written_and_with_the_marks_of_latent_thoughts():
    explicit = Layout(
        Thinking(thought="token", phase="explicit", num_thoughts=9, end_of_thinking="=#"), tiny_policy().tokenizer
    )
    assert cost.reasoning_length(explicit, explicit.encode("1+2=3;=#")) == 6
    assert cost.reasoning_length(explicit, explicit.encode("1+2=3;1+2")) == 9, "cut off at the cap"
    assert cost.reasoning_length(explicit, explicit.encode("1+2=3;1=#")) == 7, "ended at the cap"
    assert cost.reasoning_length(explicit, explicit.encode("1+2")) == 3, "ended without an answer"
    latent = Layout(LATENT, tiny_policy().tokenizer)
    assert cost.reasoning_length(latent, [latent.bot_id] * 3) == 5
    assert cost.reasoning_length(latent, []) == 0


def test_costs_meet_the_same_questions_and_count_what_was_decoded():
    model, layout = made()
    explicit = Layout(
        Thinking(thought="token", phase="explicit", num_thoughts=12, end_of_thinking="#", max_answer_tokens=2),
        layout.tokenizer,
    )
    ours, theirs = cost.measure([(model, layout), (model, explicit)], rows(4), warm_up=1)
    records = sample_records(model, explicit, [(row, GREEDY) for row in rows(4)], seed=0)
    written = [record["thoughts"] for record in records]
    assert theirs.reasoning.tolist() == [n if n == 12 else n - 1 for n in written], "`#` is one id"
    assert (ours.reasoning == 5).all() and (ours.seconds > 0).all() and len(ours.seconds) == 4
    for n in (1, 2):  # fewer questions than are answered to warm up
        assert [len(each.seconds) for each in cost.measure([(model, layout), (model, explicit)], rows(n))] == [n, n]


def test_a_ratio_has_its_interval():
    above, below = np.array([4.0, 6.0, 8.0, 6.0] * 10), np.array([2.0, 3.0, 4.0, 3.0] * 10)
    found = cost.ratio_interval(above, below)
    assert found["mean"] == found["low"] == found["high"] == 2.0
    noisy = cost.ratio_interval(above, np.roll(below, 1))
    assert noisy["low"] < noisy["mean"] == 2.0 < noisy["high"]


# -- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from rl_soft.model import policy

    saved = {}
    for name, thinking in {
        "latent": replace(LATENT, max_answer_tokens=3),
        "written": Thinking(thought="token", phase="explicit", num_thoughts=12, end_of_thinking="#"),
    }.items():
        found = tiny_policy()
        saved[name] = tmp_path_factory.mktemp(name) / "model"
        policy.save(saved[name], found.model.save_pretrained, found.tokenizer, thinking, True)
    return saved


DATA = [
    "--dataset", "chain_sum", "--eval_problems", "6",
    "--dataset_options", "{min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1, compact: true}",
]  # fmt: skip


def test_analyze_writes_its_figures(folders, tmp_path, capsys):
    main(["analyze", "probe", str(folders["latent"]), *DATA, "--output_dir", str(tmp_path / "p"), "--top_k", "2"])
    assert capsys.readouterr().out == (tmp_path / "p/probe.md").read_text()
    assert json.loads((tmp_path / "p/probe.json").read_text())["all"]["1"]["problems"] == 6
    written = ["--against", str(folders["written"]), "--output_dir", str(tmp_path / "c")]
    main(["analyze", "cost", str(folders["latent"]), *DATA, *written])
    figures = json.loads((tmp_path / "c/cost.json").read_text())
    assert figures["models"][0]["reasoning"] == 5 and figures["models"][0]["questions"] == 6
    assert figures["speed_up"]["low"] <= figures["speed_up"]["mean"] <= figures["speed_up"]["high"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["probes", "MODEL", *DATA], "one of probe, cost, traces, branching, lens, plane, all, got 'probes'"),
        (["cost", "MODEL", *DATA], "against is missing"),
        (["probe", "MODEL", *DATA, "--topk", "2"], "did you mean --top_k"),
        (["probe", "MODEL"], "dataset is missing"),
        (["probe"], "Missing argument 'MODEL'"),
    ],
)
def test_a_mistake_ends_in_one_line(folders, words, message, capsys):
    with pytest.raises(SystemExit):
        main(["analyze", *(str(folders["latent"]) if word == "MODEL" else word for word in words)])
    assert message in capsys.readouterr().err


def test_a_question_longer_than_the_model_is_refused_by_name():
    layout = Layout(replace(LATENT, max_answer_tokens=3), tiny_policy().tokenizer)
    check_lengths(rows(4), layout, 128, "d")
    long = replace(rows(1)[0], id="sum/long", question="1+" * 70)
    with pytest.raises(ValueError, match=r"dataset d, row sum/long: .* \d+ tokens, and the model has 128 positions"):
        check_lengths([*rows(4), long], layout, 128, "d")
    assert AnalysisArguments(dataset="d").top_k == 5
