import pytest
import torch
from conftest import rows

from rl_soft.evaluation import records, report
from rl_soft.evaluation.samples import evaluate
from rl_soft.model.policy import eos_token_ids
from rl_soft.rollouts.engine import rollout


def test_an_evaluation_from_python_needs_four_arguments(tiny, tmp_path):
    made, layout = tiny
    out = tmp_path / "mine"
    evaluate(made.model, layout, rows(3), str(out), samples=2)
    header, found = records.read_header(out), records.read(out / "records.jsonl")
    assert (header["name"], header["dataset"], header["n"]) == ("mine", "test", 2) and header["model"]
    assert {(r["problem_id"], r["sample"]) for r in found} == {(f"sum/{i}", s) for i in range(3) for s in (-1, 0, 1)}
    assert report.build(out)["num_problems"] == 3
    before = (out / "records.jsonl").read_bytes()
    evaluate(made.model, layout, rows(3), out, samples=2, batch_size=1)
    assert (out / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize("given", [{"rows": []}, {"samples": 0}, {"batch_size": 0}])
def test_nothing_to_do_is_refused(given, tiny, tmp_path):
    made, layout = tiny
    with pytest.raises(ValueError, match=f"{next(iter(given))}.* at least 1, got"):
        evaluate(**{"model": made.model, "layout": layout, "rows": rows(1), "out_dir": tmp_path / "x", **given})
    assert not (tmp_path / "x").exists()


def test_a_rollout_from_python_needs_three_arguments(tiny):
    made, layout = tiny
    prompts = [layout.prompt_ids(row.question) for row in rows(4)]
    out = rollout(made.model, layout, prompts)
    ends = eos_token_ids(made.model, made.tokenizer)
    assert torch.equal(out.support, rollout(made.model, layout, prompts, None, ends).support)
