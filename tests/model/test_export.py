"""A merged folder is the same model in plain transformers, and still known here.

pytest tests/model/test_export.py
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_policy
from test_adapters import IDS, KINDS, saved
from transformers import AutoModelForCausalLM, AutoTokenizer

from rl_soft.cli.app import main
from rl_soft.model import policy
from rl_soft.model.export import export
from rl_soft.model.folder import read_thinking, write_thinking
from rl_soft.model.projector import add_projector
from rl_soft.model.side_modules import save_module
from rl_soft.thoughts.thinking import Thinking

THINKING = Thinking(thought_k=3, num_thoughts=3)
REFUSED = {
    "bias": "lora_bias has no place in layers without a bias",
    "head and tokens": "PEFT cannot merge what its adapter does to lm_head",
}


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits.float()


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_folder_has_our_logits_in_plain_transformers(tmp_path: Path, kind: str) -> None:
    """Also where the adapter is on an end of a model whose head is the matrix of its embeddings: they part."""
    tied, config, _ = KINDS[kind]
    folder, _ = saved(tmp_path, tied, config)
    write_thinking(folder, THINKING)
    if kind in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[kind]):
            export(str(folder), tmp_path / "merged")
        assert not list(tmp_path.glob("merged*"))
        return
    assert export(str(folder), tmp_path / "merged") == THINKING == read_thinking(tmp_path / "merged")
    ours = logits(policy.load_policy(str(folder)).model)
    bound = 1e-5 * max(1.0, ours.abs().max().item() / 20)  # rounding grows with logits; those of one kind reach 90
    assert (logits(plain(tmp_path / "merged")) - ours).abs().max() < bound
    assert (logits(policy.load_policy(str(tmp_path / "merged")).model) - ours).abs().max() < bound


@pytest.mark.parametrize(("model_type", "tied"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_whole_weights_come_through_with_tokenizer_and_settings(tmp_path: Path, model_type: str, tied: bool) -> None:
    made = tiny_policy(model_type, tied)
    made.model.generation_config.update(do_sample=True, top_p=0.9)
    policy.save(tmp_path / "run/model", made.model.save_pretrained, made.tokenizer, THINKING, main=True)
    main(["export", str(tmp_path / "run/model"), "--merged", str(tmp_path / "out")])
    again = plain(tmp_path / "out")
    assert (logits(again) - logits(made.model)).abs().max() < 1e-5
    assert again.generation_config.top_p == 0.9
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("1+2=") == made.tokenizer.encode("1+2=")
    assert read_thinking(tmp_path / "out") == THINKING
    assert 'library_name: "transformers"' in (tmp_path / "out/README.md").read_text()


def test_a_checkpoint_thinks_as_its_run_does_and_its_dtype_can_be_chosen(tmp_path: Path) -> None:
    made = tiny_policy()
    made.model.save_pretrained(tmp_path / "run/checkpoint-2")
    made.tokenizer.save_pretrained(tmp_path / "run/checkpoint-2")
    recipe = {"method": "grpo", "dataset": "d", **THINKING.to_dict(), "num_thoughts": 5}
    (tmp_path / "run/config.yaml").write_text(json.dumps(recipe))
    main(["export", str(tmp_path / "run/checkpoint-2"), "--merged", str(tmp_path / "a/b"), "--dtype", "bfloat16"])
    assert plain(tmp_path / "a/b").dtype == torch.bfloat16
    found = read_thinking(tmp_path / "a/b")
    assert found is not None and found.num_thoughts == 5
    assert "It thinks in 5 thoughts" in (tmp_path / "a/b/README.md").read_text()


def test_what_a_plain_folder_cannot_hold_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = tiny_policy()
    folder = tmp_path / "model"
    made.model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    add_projector(made.model, gated=True)
    for name in ("projector", "value_head"):
        save_module(folder, name, made.model.projector.state_dict())
    write_thinking(folder, Thinking(thought="hybrid"))
    with caplog.at_level("WARNING", logger="rl_soft"):
        export(str(folder), tmp_path / "out")
    assert [r.message.split(" ", 3)[:3] for r in caplog.records] == [
        ["thoughts", "of", "this"],
        ["the", "value", "head"],
    ]
    again = policy.load_policy(str(tmp_path / "out"))
    assert torch.equal(again.model.projector.inner.weight, made.model.projector.inner.weight)
    assert (logits(plain(tmp_path / "out")) - logits(made.model)).abs().max() < 1e-5
    assert not (tmp_path / "out/value_head.safetensors").exists()


def test_nothing_is_overwritten_and_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "there").mkdir()
    folder, _ = saved(tmp_path, *KINDS["lora"][:2])
    capsys.readouterr()
    for words, message in (
        ([str(folder), "--merged", str(tmp_path / "there")], "exists; nothing is overwritten"),
        ([str(folder), "--merged", str(tmp_path / "new"), "--dtype", "float23"], "did you mean float32?"),
        (["./nothing", "--merged", str(tmp_path / "new")], "does not exist"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *words])
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and message in told[0]
    assert not list((tmp_path / "there").iterdir()) and not (tmp_path / "new").exists()
