"""lm-eval's own evaluator on a local task: our completions, judged by it as our evaluation judges them.

pytest tests/cli/test_lm_eval.py        (needs lm-eval)
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import rows, tiny_policy

from rl_soft.cli.app import main
from rl_soft.cli.harness import cut
from rl_soft.evaluation.generation import generate
from rl_soft.model import policy
from rl_soft.thoughts.thinking import Thinking

lm_eval = pytest.importorskip("lm_eval")
os.environ["HF_DATASETS_OFFLINE"] = "1"

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
"""
GENERATES = """
target_delimiter: ""
generation_kwargs: {until: [";"], do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOOSES = """
doc_to_choice: ["1", "2", "3"]
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
EXPLICIT = Thinking(
    phase="explicit",
    num_thoughts=5,
    thought_k=3,
    max_answer_tokens=4,
    end_of_thinking="=#",
    question_template="{question}+",
)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A model, problems whose gold is what the model answers to half of them, and two tasks."""
    made = tiny_policy()
    policy.save(tmp_path / "model", made.model.save_pretrained, made.tokenizer, EXPLICIT, main=True)
    done = generate(made.model, made.tokenizer, [r.question for r in rows()], thinking=EXPLICIT, greedy=True)
    answers = [cut(one.text.partition("=#")[2], [";"]) for (one,) in done]
    problems = [
        {"id": str(i), "question": r.question, "answer": "=#" + (answers[i] if i % 2 else "none"),
         "answer_type": "free", "label": i % 3}
        for i, r in enumerate(rows())
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "tasks").mkdir()
    for name, kind, target, rest in (
        ("sums", "generate_until", "answer", GENERATES),
        ("choices", "multiple_choice", "label", CHOOSES),
    ):
        text = TASK.format(name=name, kind=kind, target=target, file=tmp_path / "rows.jsonl") + rest
        (tmp_path / f"tasks/{name}.yaml").write_text(text)
    return tmp_path


def evaluated(places: Path, task: str, **given: Any) -> Any:
    from lm_eval.tasks import TaskManager

    import rl_soft.cli.lm_eval_model  # noqa: F401  (registers the model)

    gen_kwargs = given.pop("gen_kwargs", None)
    return lm_eval.simple_evaluate(
        model="rl_soft",
        model_args={"pretrained": str(places / "model"), **given},
        tasks=[task],
        task_manager=TaskManager(include_path=str(places / "tasks"), include_defaults=False),
        gen_kwargs=gen_kwargs,
        log_samples=True,
        bootstrap_iters=0,
    )


def texts(results: Any, task: str) -> list[str]:
    return [sample["resps"][0][0] for sample in sorted(results["samples"][task], key=lambda s: s["doc_id"])]


@pytest.mark.parametrize("thought", ["gumbel", "soft", "token"])
def test_greedy_completions_and_their_score_are_those_of_our_evaluation(places: Path, thought: str) -> None:
    results = evaluated(places, "sums", thought=thought, batch_size=3)
    out = places / f"eval-{thought}"
    main([
        "eval", str(places / "model"), "--dataset", str(places / "rows.jsonl"), "--output_dir", str(out),
        "--eval_samples", "1", "--thought", thought,
    ])  # fmt: skip
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    ours = {r["problem_id"]: r["text"] for r in records if r["sample"] == -1}
    said = [ours[f"rows/{i}"].partition("=#") for i in range(8)]
    expected = [end + cut(answer, [";"]) if end else "" for _, end, answer in said]
    assert texts(results, "sums") == expected
    golds = [json.loads(line)["answer"] for line in (places / "rows.jsonl").read_text().splitlines()]
    right = sum(a == gold for a, gold in zip(expected, golds, strict=True)) / 8
    assert results["results"]["sums"]["exact_match,none"] == pytest.approx(right)
    assert thought != "gumbel" or 0.5 <= right < 1, "golds of every other problem are what it answers"


def test_where_a_task_samples_the_noise_is_addressed_by_seed_and_document(places: Path) -> None:
    given = {"gen_kwargs": "do_sample=True,temperature=0.7", "seed": 3}
    results = evaluated(places, "sums", batch_size=3, **given)
    made = policy.load_policy(str(places / "model"))
    warm = Thinking(**{**EXPLICIT.to_dict(), "temperature": 0.7, "thought_temperature": 0.7})
    names = [f"sums/{i}/0" for i in range(8)]
    done = generate(made.model, made.tokenizer, [r.question for r in rows()], thinking=warm, seed=3, ids=names)
    expected = [one.text.partition("=#") for (one,) in done]
    assert texts(results, "sums") == [end + cut(answer, [";"]) for _, end, answer in expected]
    assert texts(evaluated(places, "sums", **{**given, "seed": 4}), "sums") != texts(results, "sums")


def test_log_likelihoods_are_those_of_plain_tokens_and_of_no_other_kind(places: Path) -> None:
    results = evaluated(places, "choices", thought="token", batch_size=3)
    made = policy.load_policy(str(places / "model"))
    for sample in results["samples"]["choices"]:
        bos = [made.tokenizer.bos_token_id] if made.tokenizer.bos_token_id is not None else []
        ids = bos + made.tokenizer.encode(sample["doc"]["question"])
        with torch.no_grad():
            log_p = made.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for choice, (found, _) in zip("123", (r[0] for r in sample["resps"]), strict=True):
            expected = log_p[made.tokenizer.convert_tokens_to_ids(choice)]
            assert float(found) == pytest.approx(float(expected), abs=1e-4)
    with pytest.raises(ValueError, match=r"asks for log-likelihoods, and with thought gumbel .* thought=token"):
        evaluated(places, "choices", thought="gumbel")


@pytest.mark.slow  # lm-eval looks through all of its tasks first
def test_the_command_takes_what_lm_eval_takes(places: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["lm-eval", "--tasks", "sums", "--include_path", str(places / "tasks"), "--limit", "2", "--model_args"]
    main([*words, f"pretrained={places / 'model'},thought=soft,num_thoughts=3"])
    shown = capsys.readouterr().out
    assert shown.startswith("rl_soft (") and "exact_match" in shown
    for wrong, message in (("thougt=soft", "did you mean"), ("thought=sft", "thought must be one of")):
        with pytest.raises(SystemExit):
            main([*words, f"pretrained={places / 'model'},{wrong}"])
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
