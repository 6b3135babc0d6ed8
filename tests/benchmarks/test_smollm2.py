"""The study of SmolLM2 ends with one table, however often it is killed on the way; what its report says.

pytest tests/benchmarks/test_smollm2.py; -m slow: a study of a tiny model, killed three times
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from rl_soft.model import policy

sys.path.insert(0, str(ROOT / "benchmarks"))
from smollm2_equations import equations_of, written
from smollm2_problems import count_alike, to_be_asked, to_learn_from
from smollm2_report import ARMS, METRICS, SPLITS, Results, last_kinds, report, show, summarise

SIZES = {
    "unseen": 3, "seen": 3, "validation": 2, "warm_batch": 4, "warm_steps": 2, "cool_steps": 2, "prompts": 2,
    "completions": 2, "steps": 2, "samples": 4, "thoughts": 8, "lora_r": 2,
    "codi_steps": 2, "codi_batch": 4, "gradient_batches": 2,
}  # fmt: skip
CSV = [
    ("Ann has number0 red , and number1 blue pens . How many ?", "{a}.0 4.0", "+ number0 number1"),
    ("A box holds number0 bags of number1 nuts ; number2 are eaten .", "3.0 {a}.0 2.0", "- * number0 number1 number2"),
]


def problems(folder: Path) -> Path:
    """Two files in the form of the study's: 40 and 10 problems, and some that the study leaves out."""
    folder.mkdir(parents=True)
    lines = ["Question,Numbers,Equation,Answer"]
    for a in range(5, 25):
        lines += [f'"{question}",{numbers.format(a=a)},{equation},0' for question, numbers, equation in CSV]
    lines += [
        lines[1],
        '"half of number0 pies",3.0 2.0,/ number0 number1,1.5',
        '"number0 less number1",3.0 9.0,- number0 number1,0',
    ]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    bodies = "Bo had {n} pens. He lost 2", "At noon {n} birds sat there. Then 2 flew off", "Of {n} eggs we ate 2"
    asked = [
        {"ID": f"chal-{i}-{n}", "Body": body.format(n=n), "Question": "How many are left?",
         "Equation": f"( {n}.0 - 2.0 )", "Answer": n - 2.0}
        for i, body in enumerate(bodies) for n in [*range(5, 15), 900]
    ]  # fmt: skip
    (folder / "SVAMP.json").write_text(json.dumps(asked))
    return folder


def test_problems_are_read_with_their_steps(tmp_path):
    learnt = to_learn_from(problems(tmp_path / "svamp"), 200, 0)
    by_question = {row["question"]: row for row in learnt}
    assert by_question["Ann has 7 red, and 4 blue pens. How many?"]["steps"] == ["7+4=11"]
    nuts = by_question["A box holds 3 bags of 7 nuts; 2 are eaten."]
    assert (nuts["steps"], nuts["answer"]) == (["3*7=21", "21-2=19"], "19")
    assert len(learnt) == 40, "no problem twice, none with a fraction or a number below 0"


def test_copies_have_other_numbers_and_are_right(tmp_path):
    rows = to_learn_from(problems(tmp_path / "svamp"), 40, 3)
    assert len({row["question"] for row in rows}) == len(rows) > 100
    for row in rows:
        for step in row["steps"]:
            equation, _, value = step.partition("=")
            assert eval(equation) == int(value) <= 40
        assert row["answer"] == row["steps"][-1].rpartition("=")[2]
    assert any("half of" in row["question"] for row in rows), "3 pies cannot be halved; other numbers can"


def test_a_family_is_a_problem_and_its_variations(tmp_path):
    families = to_be_asked(problems(tmp_path / "svamp"), 200)
    assert sorted(len(rows) for rows in families) == [10, 10, 10], "900 is larger than 200"
    for rows in families:
        assert len({row["id"].rpartition("-")[0] for row in rows}) == 1


def test_problems_are_alike_that_share_half_of_their_words():
    learnt = [{"question": "Ann has 3 red pens and 4 blue pens."}]
    asked = ["Bo has 7 red pens and 2 blue pens.", "Ann has 3 red hats, Bo 9.", "How many eggs?"]
    assert count_alike([{"question": text} for text in asked], learnt) == 1


def test_a_choice_of_operation_is_told_from_its_numbers_and_its_result(tmp_path):
    (tmp_path / "SVAMP.json").write_text(json.dumps([
        {"ID": "a", "Equation": "( 8.0 - 3.0 )"},
        {"ID": "b", "Equation": "( ( 8.0 - 3.0 ) + 2.0 )"},
    ]))  # fmt: skip
    texts = {
        "a": ["8-3=5\n####5", "8-2=6\n####6", "8+3=11\n####1", "8-3=6\n####5", "8\n####8"],
        "b": ["8-3=5\n5+2=7", "8-3=5"],
    }
    rows = [
        {"problem_id": f"unseen/{name}", "sample": i, "text": text, "outcome": "correct" if i == 0 else "wrong"}
        for name, of in texts.items()
        for i, text in enumerate(of)
    ]
    found = written([*rows, {"problem_id": "unseen/a", "sample": -1}], equations_of(tmp_path))
    assert found["-"] == {
        "problems": 1,
        "answer": 1 / 5,
        "operations": 3 / 5,
        "numbers": 2 / 5,
        "holds": 3 / 5,
        "follows": 2 / 5,
    }
    assert found["two"] == {
        "problems": 1,
        "answer": 1 / 2,
        "operations": 1 / 2,
        "numbers": 1 / 2,
        "holds": 1,
        "follows": 0,
    }


def tiny_model(folder: Path) -> Path:
    """A random model that spells the problems in characters."""
    characters = "".join(map(chr, range(32, 127))) + "\n"
    made = policy.make({**TINY, "model_type": "llama", "max_position_embeddings": 1024}, characters, 0)
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def study(folder: Path, model: Path, **kwargs) -> subprocess.Popen:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/smollm2.py"),
        "--seeds",
        "1",
        "--arms",
        "token",
        "soft then token",
    ]
    command += [
        "--svamp",
        str(model.parent / "svamp"),
        "--model",
        str(model),
        "--out",
        str(folder / "out"),
        "--results",
        str(folder / "results"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*command, "--size", *(f"{name}={value}" for name, value in SIZES.items())],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs,
    )  # fmt: skip


def table(folder: Path) -> dict:
    """What the report wrote, without the clock."""
    found = json.loads((folder / "results.json").read_text())
    for row in found["training"].values():
        row.pop("seconds")
    return found


@pytest.mark.slow
def test_a_study_that_is_killed_ends_with_the_same_table(tmp_path):
    problems(tmp_path / "svamp")
    model, whole, killed = tiny_model(tmp_path / "model"), tmp_path / "whole", tmp_path / "killed"
    done = study(whole, model)
    printed, _ = done.communicate(timeout=1800)
    assert done.returncode == 0, printed
    signs = "results/warm.json", "out/token-seed1/checkpoint-2", "out/soft+token-seed1/metrics.jsonl"
    for sign in signs:
        process = study(killed, model, start_new_session=True)
        while process.poll() is None and not (killed / sign).exists():
            time.sleep(0.02)
        assert process.poll() is None
        os.killpg(process.pid, 9)
        process.communicate()
    again = study(killed, model)
    printed_again, _ = again.communicate(timeout=1800)
    assert again.returncode == 0, printed_again
    assert table(killed) == table(whole)
    assert set(table(whole)["arms"]) == {"token", "soft then token"} and "soft+soft-seed1" in table(whole)["missing"]
    assert (whole / "results.png").stat().st_size > 10_000
    assert "Not there yet" in printed and "soft then token minus token" in printed


def write_results(folder: Path, seeds: dict[str, list[int]]) -> None:
    """Files as of a finished study: `token` and `soft` solve half of the problems, `soft` one problem more."""
    folder.mkdir(parents=True)
    rows = [f"p{i}" for i in range(12)]
    counts = {"token": [16, 0] * 6, "soft": [16, 0] * 5 + [16, 16], "before": [8, 0] * 6}

    def evaluation(name):
        return {"samples": 16} | {s: {"correct": counts[name], "greedy": [0] * 12} for s in SPLITS}

    files = {
        "sizes": {"steps": 5},
        "problems": dict.fromkeys(SPLITS, rows) | {f"families of {s}": [i // 6 for i in range(12)] for s in SPLITS},
    }
    for kind in last_kinds(ARMS):
        files[f"warm-{kind}-eval"] = {
            "evaluations": {"own": evaluation("before")},
            "agreement": dict.fromkeys(("same text", "share of the text before they part"), 0.5),
        }
    for arm, some in seeds.items():
        for seed in some:
            for half in (1, 2):
                files[f"{'+'.join([arm] * half)}-seed{seed}"] = {"curve": {name: [0.25] * 5 for name in METRICS}}
            files[f"{arm}+{arm}-seed{seed}-eval"] = {"evaluations": {"own": evaluation(arm)}}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_a_table_names_the_seeds_that_it_has(tmp_path, capsys):
    write_results(tmp_path / "r", {"token": [1, 2], "soft": [1, 3]})
    report(tmp_path / "r")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["arms"]["token"]["seeds"] == [1, 2] and found["arms"]["soft"]["seeds"] == [1, 3]
    assert found["minus token"]["soft"]["seeds"] == [1], "arms are compared on the seeds that both have"
    assert "soft+soft-seed2-eval" in found["missing"] and "soft+soft-seed2-eval" in capsys.readouterr().out
    assert found["training"]["soft"]["mixed groups"] == 0.75 and found["training"]["soft"]["steps"] == 10


def test_figures_are_paired_by_problem_and_resampled_with_all_their_seeds(tmp_path):
    for name, seeds in (("one", [1]), ("three", [1, 2, 3])):
        write_results(tmp_path / name, {"token": seeds, "soft": seeds})
        report(tmp_path / name)
    one, three = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "three"))
    pair = one["minus token"]["soft"]["unseen"]["pass@1"]
    assert pair["mean"] == pytest.approx(1 / 12)
    assert one["arms"]["token"]["gain"]["unseen"]["pass@1"]["mean"] == pytest.approx(0.25)
    assert pair["families"][0] <= pair["mean"] <= pair["families"][1] and pair["families"] != [
        pair["low"],
        pair["high"],
    ]
    # Seeds that agree on every problem are no further problems: the interval stays as wide.
    ends = [found["minus token"]["soft"]["unseen"]["pass@1"] for found in (one, three)]
    assert ends[0]["low"] == pytest.approx(ends[1]["low"]) and ends[0]["high"] == pytest.approx(ends[1]["high"])


def test_the_pages_have_the_tables_of_the_result_files():
    folder = ROOT / "docs/results/smollm2"
    stored, found = json.loads(folder.with_suffix(".json").read_text()), summarise(Results(folder, (1, 2, 3)))
    assert show(found, []) == show(stored, []), "python benchmarks/smollm2_report.py"
    pages = "\n\n".join((ROOT / f"docs/{name}.md").read_text() for name in ("results", "smollm2"))
    tables = show(stored, []).strip().split("\n\n")
    assert len(tables) > 3 and all(f"\n\n{table}\n\n" in pages for table in tables)


def test_results_without_their_runs_and_other_sizes_are_refused(tmp_path):
    problems(tmp_path / "svamp")
    (tmp_path / "model").mkdir()
    (tmp_path / "study/results").mkdir(parents=True)
    (tmp_path / "study/results/warm.json").write_text("{}")
    said, _ = study(tmp_path / "study", tmp_path / "model").communicate(timeout=120)
    assert "leave --results out to make them again" in said
    (tmp_path / "study/out/sizes.json").write_text(json.dumps({"unseen": 4}))
    (tmp_path / "study/results/sizes.json").unlink()
    said, _ = study(tmp_path / "study", tmp_path / "model").communicate(timeout=120)
    assert f"{tmp_path}/study/out was made with largest = None, not 200; choose another --out" in said
