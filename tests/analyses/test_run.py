"""Analyses on disk: records that are resumed, files that are functions of them, the report, and mistakes.

pytest tests/analyses/test_run.py
"""

import csv
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import tiny_policy

from rl_soft import files
from rl_soft.analyses import branching
from rl_soft.analyses.findings import above, compact, enough, number, resampled, shown
from rl_soft.analyses.report import _pieces
from rl_soft.analyses.run import Journal
from rl_soft.cli import main
from rl_soft.model import policy
from rl_soft.thoughts.thinking import Thinking

SUMS = "{min_terms: 3, max_terms: 3, min_digits: 1, max_digits: 1, compact: true}"
DATA = ["--dataset", "chain_sum", "--eval_problems", "6", "--dataset_options", SUMS]
END = ["--end_of_thinking", "=#;"]  # the tokenizer's characters are few
SMALL = [*END, "--num_thoughts", "6", "--thought_k", "4", "--draws", "3", "--eval_batch_size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A plain transformers folder, as anyone has one."""
    found = tiny_policy("qwen2")
    path = tmp_path_factory.mktemp("model") / "<tiny>"
    found.model.save_pretrained(path)
    found.tokenizer.save_pretrained(path)
    return str(path)


def analyze(kind, folder, out, *more):
    main(["analyze", kind, folder, *DATA, *SMALL, "--output_dir", str(out), *more])


# -- findings ------------------------------------------------------------------------------------------------------


def test_intervals_resample_prompts_and_not_steps():
    """Steps that repeat their prompt's value add nothing: the interval is that of the prompts."""
    draw = np.random.default_rng(0)
    groups = [draw.normal(size=1) for _ in range(40)]
    alone = resampled(groups, np.mean)
    repeated = resampled([np.repeat(group, 50) for group in groups], np.mean)
    assert repeated == pytest.approx(alone)
    width = alone["high"] - alone["low"]
    assert width == pytest.approx(2 * 1.96 * np.std(np.concatenate(groups)) / 40**0.5, rel=0.15)
    assert resampled([np.zeros(0), np.ones(3), np.ones(1)], np.mean)["value"] == 1, "none without steps counts"
    for groups in ([np.zeros(0)], [np.zeros(0), np.arange(50.0)]):  # fifty steps of one prompt are one prompt
        assert not enough(groups)
        with pytest.raises(ValueError, match="needs at least two that have thoughts"):
            resampled(groups, np.mean)


def test_figures_in_words():
    figure = {"value": 12345.678, "low": -0.00012345, "high": 0.5}
    assert shown(figure) == "12,346 (−0.000123 to 0.5)" and number(0.1) == "0.1"
    assert [above(figure, level) for level in (-1, 0.1, 1)] == ["yes", "undecided", "no"]
    assert compact([1 / 3, [2, 0.1 + 0.2]]) == [0.333333, [2, 0.3]]


# -- records -------------------------------------------------------------------------------------------------------


def test_a_journal_goes_on_and_refuses_what_is_not_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.0)
    path, questions = tmp_path / "a" / "x.jsonl", {"p": "1", "q": "2"}

    def record(name, value):
        return {"problem_id": name, "question_hash": questions[name], "value": value}

    with Journal(path, {"seed": 7}, questions) as journal:
        journal.append(record("p", 0.5))
        with pytest.raises(ValueError, match="is being written by another process"):
            Journal(path, {"seed": 7}, questions)
    with path.open("ab") as file:
        file.write(b'{"problem_id": "q", "question')  # killed while writing
    with Journal(path, {"seed": 7}, questions) as journal:
        assert journal.records == {"p": record("p", 0.5)}
        journal.append(record("q", 1.0))
    with Journal(path, {"seed": 7}, {"q": "2"}) as journal:
        assert journal.records == {"q": record("q", 1.0)}, "only the problems that are asked for"
    with pytest.raises(
        ValueError, match=r"x.jsonl holds records with seed = 7, these have 8; choose another output_dir"
    ):
        Journal(path, {"seed": 8}, questions)
    with pytest.raises(ValueError, match="holds problem p with another question"):
        Journal(path, {"seed": 7}, {"p": "3"})
    path.write_text(path.read_text().replace('{"problem_id": "p"', "broken"))
    with pytest.raises(ValueError, match="line 2: not a record of an analysis"):
        Journal(path, {"seed": 7}, questions)
    path.write_text('{"seed": 7}\n{"other": 1}\n')
    with pytest.raises(ValueError, match="line 2: not a record of an analysis"):
        Journal(path, {"seed": 7}, questions)
    for text in ('{"my": "document"}', '{"my": "docu', "[1]\n", "text"):  # of someone else, and left as it is
        path.write_text(text)
        with pytest.raises(
            ValueError, match=r"x.jsonl(, line 1: not a record of an analysis| holds records with my = )"
        ):
            Journal(path, {"seed": 7}, questions)
        assert path.read_text() == text
    path.write_text('{"se')  # killed while writing its first line
    Journal(path, {"seed": 7}, questions).__exit__()
    assert path.read_text() == '{"seed": 7}\n'
    with pytest.raises(ValueError, match=r"y\.jsonl cannot be written: "):
        Journal(path / "y.jsonl", {"seed": 7}, questions)


def test_a_stopped_analysis_goes_on_and_ends_with_the_same_figures(folder, tmp_path, monkeypatch, capsys):
    measured, measure = [], branching.measure

    def stopping(model, layout, rows):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append([row.id for row in rows])
        return measure(model, layout, rows)

    monkeypatch.setattr(branching, "measure", stopping)
    stop = None
    analyze("branching", folder, tmp_path / "whole")
    whole, stop = measured[:], 1
    measured.clear()
    with pytest.raises(SystemExit) as exit_code:
        analyze("branching", folder, tmp_path / "cut")
    assert exit_code.value.code == 130 and measured == whole[:1]
    stop = None
    analyze("branching", folder, tmp_path / "cut")
    assert measured == whole and [len(part) for part in whole] == [4, 2]
    for end in ("jsonl", "json", "csv", "png"):
        made = [(tmp_path / name / f"branching.{end}").read_bytes() for name in ("whole", "cut")]
        assert made[0] == made[1], end
    analyze("branching", folder, tmp_path / "cut", "--branch_weight", "0.2")
    assert measured == whole, "figures that depend on it are made again, records are not"
    analyze("branching", folder, tmp_path / "cut", "--eval_problems", "8")
    assert [len(part) for part in measured] == [4, 2, 2], "more problems: only what is missing"
    with pytest.raises(SystemExit):
        analyze("branching", folder, tmp_path / "cut", "--thought_k", "3")
    assert "holds records with thought_k = 4, these have 3" in capsys.readouterr().err


# -- the report ----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.sources = [], [], "", []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_marked_pieces_add_up_to_the_text_where_characters_have_several_ids():
    """Ids are bytes; marks change at every place, within characters too."""
    text = "aé漢🙂🙂z é"
    layout = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace")))
    ids = list(text.encode())
    for n in range(1, len(ids)):
        pieces = _pieces(layout, ids, [i >= n for i in range(len(ids))])
        assert "".join(piece for piece, _ in pieces) == text and "\ufffd" not in text
    assert _pieces(layout, ids[:-1], [False] * (len(ids) - 1)) == [(text[:-1] + "\ufffd", False)], "cut off there"


def test_the_report_holds_every_analysis_and_nothing_from_outside(folder, tmp_path, capsys):
    evals = [str(tmp_path / name) for name in ("token", "soft")]
    for name in evals:
        settings = ["--phase", "explicit", "--end_of_thinking", "#", "--num_thoughts", "6", "--max_answer_tokens", "3"]
        main(
            [
                "eval",
                folder,
                *DATA,
                "--eval_samples",
                "4",
                "--output_dir",
                name,
                "--thought",
                name.split("/")[-1],
                *settings,
            ]
        )
    out = tmp_path / "all"
    analyze("all", folder, out, "--evals", f"[{', '.join(evals)}]", "--eval_samples", "2", "--branch_weight", "0.05")
    said = capsys.readouterr().out
    assert f"report: {out / 'report.html'}" in said
    text = (out / "report.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "<tiny>" in page.text and "<tiny>" not in text
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in page.sources)
    assert page.tags.count("img") == 5, "four analyses and Pass@k"
    for name in ("traces", "branching", "lens", "plane"):
        figures = json.loads((out / f"{name}.json").read_text())
        assert figures["analysis"] == name and figures["model"] == folder and figures["thought_k"] == 4
        for sentence in figures["says"]:
            assert sentence in page.text and sentence in said
        assert all(claim["text"] in page.text for claim in figures["claims"]) and figures["claims"]
        table = list(csv.reader((out / f"{name}.csv").open()))
        assert len(table) > 3 and len({len(row) for row in table}) == 1
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len((out / f"{name}.jsonl").read_text().splitlines()) == 7, "what it depends on, and six problems"
    before = {path.name: path.read_bytes() for path in out.glob("*.*")}
    analyze("all", folder, out, "--evals", f"[{', '.join(evals)}]", "--eval_samples", "2", "--branch_weight", "0.05")
    assert before == {path.name: path.read_bytes() for path in out.glob("*.*")}, "made again from the records alone"


def test_a_model_of_ours_keeps_its_own_thinking(tmp_path):
    found = tiny_policy()
    thinking = Thinking(thought="gumbel", thought_k=3, num_thoughts=4, answer_prompt="#", step_separator=";")
    policy.save(tmp_path / "model", found.model.save_pretrained, found.tokenizer, thinking, True)
    main(["analyze", "traces", str(tmp_path / "model"), *DATA, "--output_dir", str(tmp_path / "out")])
    figures = json.loads((tmp_path / "out" / "traces.json").read_text())
    assert figures["phase"] == "latent" and figures["num_thoughts"] == 4 and figures["thought_k"] == 3
    assert figures["figures"]["length"]["soft"]["value"] == 4


@pytest.mark.parametrize(
    "words,message",
    [
        (["branching", "MODEL", *DATA], "output_dir is missing: rl-soft analyze branching MODEL"),
        (["lens", "MODEL", *DATA, "--output_dir", "o", "--thought_k", "1"], "thought_k must be 0 or at least 2"),
        (["lens", "MODEL", *DATA, "--output_dir", "o", "--thought_k", "999"], "at most the vocabulary size"),
        (["plane", "MODEL", *DATA, "--output_dir", "o", "--thought", "gumbel"], "thought is not an argument of this"),
        (["plane", "MODEL", *DATA, "--output_dir", "o", "--evals", "x"], "evals is for the report of rl-soft analyze"),
        (["all", "MODEL", *DATA, "--output_dir", "o", "--evals", "nowhere"], "nowhere is not an evaluation"),
        (
            ["traces", "MODEL", *DATA, "--output_dir", "o", "--branch_weight", "0.7"],
            "branch_weight must be at least 0",
        ),
        (
            ["traces", "MODEL", *DATA, *END, "--output_dir", "o", "--num_thoughts", "999"],
            "the model has 128 positions",
        ),
        (["traces", "MODEL", *DATA, "--output_dir", "o"], "end_of_thinking '</think>' encodes to no token"),
        (["lens", "MODEL", *DATA, "--output_dir", f"{__file__}/o"], "test_run.py is a file; choose another"),
        (["branching", "MODEL", *DATA, *END, "--output_dir", "o", "--eval_problems", "1"], "must be at least 2 for"),
        (["plane", "MODEL", *DATA, *END, "--output_dir", "o", "--system_prompt", "Hi"], "needs a chat template"),
        (["tracer", "MODEL", *DATA], "analyze must be one of probe, cost, traces, branching, lens, plane, all, got"),
    ],
)
def test_a_mistake_ends_in_one_line(folder, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["analyze", *(folder if word == "MODEL" else word for word in words)])
    said = capsys.readouterr().err
    assert message in said and len(re.findall("error:", said)) == 1
    assert not (tmp_path / "o").exists()
