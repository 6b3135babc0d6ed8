"""lighteval's own pipeline on a local task, with the model file that `lighteval custom` is given.

pytest tests/cli/test_lighteval.py        (needs lighteval, in an environment of its own)
"""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import rows, tiny_policy

from rl_soft.cli.harness import cut
from rl_soft.evaluation.generation import Completion, generate
from rl_soft.model import policy
from rl_soft.thoughts.thinking import Thinking

pytest.importorskip("lighteval")

TASK = """
from lighteval.metrics.metrics import Metrics
from lighteval.tasks.lighteval_task import LightevalTaskConfig
from lighteval.tasks.requests import Doc


def prompt(line, task_name=None):
    return Doc(task_name=task_name, query=line["question"], choices=[line["answer"]], gold_index=0)


TASKS_TABLE = [
    LightevalTaskConfig(
        name="sums",
        prompt_function=prompt,
        hf_repo={folder!r},
        hf_subset="default",
        evaluation_splits=["test"],
        hf_avail_splits=["test"],
        metrics=[Metrics.exact_match],
        generation_size=8,
        stop_sequence=[";"],
    )
]
"""
EXPLICIT = Thinking(phase="explicit", num_thoughts=5, thought_k=3, max_answer_tokens=4, end_of_thinking="=#")


def said(done: Completion, stops: tuple[str, ...] = (";",)) -> str:
    _, end, answer = done.text.partition("=#")
    return end + cut(answer, stops)


@pytest.fixture
def places(tmp_path: Path) -> Path:
    made = tiny_policy()
    policy.save(tmp_path / "model", made.model.save_pretrained, made.tokenizer, EXPLICIT, main=True)
    done = generate(made.model, made.tokenizer, [r.question for r in rows()], thinking=EXPLICIT, greedy=True)
    problems = [
        {"question": r.question, "answer": said(one) if i % 2 else "none"}
        for i, (r, (one,)) in enumerate(zip(rows(), done, strict=True))
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/test.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    (tmp_path / "tasks.py").write_text(TASK.format(folder=str(tmp_path / "data")))
    return tmp_path


@pytest.mark.slow  # lighteval reads all of its tasks first
def test_its_pipeline_scores_our_completions(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline: Any = ModuleType("tiny_benchmarks")  # it downloads when it is imported
    offline.TASKS_TABLE = []
    monkeypatch.setitem(sys.modules, "lighteval.tasks.tasks.tiny_benchmarks", offline)
    # Judges of other tasks ask for models by an argument that huggingface_hub 1 has not.
    monkeypatch.setattr("huggingface_hub.HfApi.list_models", lambda *args, **kwargs: iter(()))
    from lighteval.logging.evaluation_tracker import EvaluationTracker
    from lighteval.models.custom.custom_model import CustomModelConfig
    from lighteval.pipeline import ParallelismManager, Pipeline, PipelineParameters

    from rl_soft.cli import lighteval_model

    pipeline = Pipeline(
        tasks="sums|0",
        pipeline_parameters=PipelineParameters(
            launcher_type=ParallelismManager.CUSTOM, custom_tasks_directory=str(places / "tasks.py")
        ),
        evaluation_tracker=EvaluationTracker(output_dir=str(places / "out")),
        model_config=CustomModelConfig(
            model_name=f"{places / 'model'},batch_size=3", model_definition_file_path=lighteval_model.__file__
        ),
    )
    pipeline.evaluate()
    found = next(scores for task, scores in pipeline.get_results()["results"].items() if task.startswith("sums"))
    gold = [json.loads(line)["answer"] for line in (places / "data/test.jsonl").read_text().splitlines()]
    made = policy.load_policy(str(places / "model"))
    done = generate(made.model, made.tokenizer, [r.question for r in rows()], thinking=EXPLICIT, greedy=True)
    right = sum(said(one) == g for (one,), g in zip(done, gold, strict=True)) / len(gold)
    assert found["em"] == pytest.approx(right) and 0.5 <= right < 1


def test_choices_are_scored_for_plain_tokens_and_samples_drawn_by_their_address(places: Path) -> None:
    from lighteval.models.custom.custom_model import CustomModelConfig
    from lighteval.models.model_loader import load_model
    from lighteval.tasks.requests import Doc

    from rl_soft.cli import lighteval_model

    def loaded(keys: str) -> lighteval_model.SoftModel:
        file = lighteval_model.__file__
        return load_model(CustomModelConfig(model_name=f"{places / 'model'}{keys}", model_definition_file_path=file))

    doc = Doc(query="1+2=", choices=["3", "4"], gold_index=0, task_name="t", id="0", num_samples=2)
    (choices,) = loaded(",thought=token").loglikelihood([doc])
    assert len(choices.logprobs) == 2 and max(choices.logprobs) < 0
    with pytest.raises(ValueError, match="asks for log-likelihoods, and with thought gumbel"):
        loaded("").loglikelihood([doc])
    (drawn,) = loaded(",seed=3").greedy_until([doc])
    made = policy.load_policy(str(places / "model"))
    (ours,) = generate(made.model, made.tokenizer, [doc.query], thinking=EXPLICIT, seed=3, samples=2, ids=["t/0"])
    assert drawn.text == [said(one, ()) for one in ours]
    with pytest.raises(ValueError, match="did you mean"):
        loaded(",thougt=soft")
