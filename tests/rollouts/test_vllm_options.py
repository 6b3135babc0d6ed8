"""What has to be so before vLLM is asked for anything: told in one line, without vLLM.

pytest tests/rollouts/test_vllm_options.py
"""

import importlib.metadata
import importlib.util
import json

import pytest
from conftest import tiny_policy

from rl_soft.config.recipe import load_command
from rl_soft.evaluation.generation import Task, complete
from rl_soft.model import policy
from rl_soft.model.policy import describe_policy
from rl_soft.rollouts.engine import rollout
from rl_soft.rollouts.engines import OnVllm, roll_of
from rl_soft.rollouts.vllm import cpu, options
from rl_soft.rollouts.vllm.about import identity
from rl_soft.rollouts.vllm.serve import command
from rl_soft.thoughts.kinds import ENGINES, KINDS
from rl_soft.thoughts.layout import Layout


@pytest.fixture
def folder(tmp_path, thinking):
    made = tiny_policy()
    policy.save(tmp_path / "model", made.model.save_pretrained, made.tokenizer, thinking, True)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scheduler-cls", "x.Y"], "--scheduler-cls is not available: the plugin has its own"),
        (["--scheduler_cls=x.Y"], "--scheduler-cls is not available"),
        (["--no-enable-prompt-embeds"], "thoughts are fed as embeddings"),
        (["--speculative-config", "{}"], "a draft is made of tokens"),
        (["--speculative-config.model", "x"], "a draft is made of tokens"),
        (["-pp", "2"], "-pp must be 1: what is drawn on the last stage"),
        (["--pipeline-parallel-size=2"], "--pipeline-parallel-size must be 1"),
        (["--hf-overrides.x", "1"], "give --hf-overrides as one JSON object"),
    ],
)
def test_options_that_would_break_soft_rows(folder, words, told):
    with pytest.raises(ValueError, match=told):
        command(str(folder), words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--hf-overrides", '{"architectures": ["X"]}'], "--hf-overrides: architectures is set by rl-soft serve"),
        (["--additional-config", "[1]"], "--additional-config must be a JSON object"),
        (["--max-logprobs", "19"], "--max-logprobs must be at least 20 for 8 slots"),
    ],
)
def test_options_that_ours_are_put_into(folder, monkeypatch, words, told):
    monkeypatch.setattr("rl_soft.rollouts.vllm.serve.check_vllm", lambda: None)
    monkeypatch.setattr("rl_soft.rollouts.vllm.serve.check_architecture", lambda model: None)
    with pytest.raises(ValueError, match=told):
        command(str(folder), words)


def test_a_users_own_options_pass_through_and_are_the_last(folder, monkeypatch):
    monkeypatch.setattr("rl_soft.rollouts.vllm.serve.check_vllm", lambda: None)
    monkeypatch.setattr("rl_soft.rollouts.vllm.serve.check_architecture", lambda model: None)
    monkeypatch.delenv("VLLM_SERVER_DEV_MODE", raising=False)
    own = ["--hf_overrides", '{"rope_theta": 5}', "--logits-processors", "a:B", "c:D", "-tp", "2"]
    made = command(str(folder), own, slots=4, thoughts=9)
    assert made[3:5] == ["serve", str(folder)] and made[-2:] == ["-tp", "2"]
    overrides = json.loads(made[made.index("--hf-overrides") + 1])
    assert overrides == {"rope_theta": 5, "architectures": ["SoftLlamaForCausalLM"]}
    at = made.index("--logits-processors")
    assert made[at + 1 : at + 4] == ["rl_soft.rollouts.vllm.admission:Admission", "a:B", "c:D"]
    assert "VLLM_SERVER_DEV_MODE" not in options.os.environ
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "0")
    command(str(folder), ["--weight-transfer-config", '{"backend": "nccl"}'])
    assert options.os.environ["VLLM_SERVER_DEV_MODE"] == "0", "a user's own word stays"


def test_vllm_is_missing_of_another_version_or_has_the_wrong_runner(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="vLLM is not installed; install it with `pip install rl-soft"):
        options.check_vllm()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(cpu, "prepare", lambda: None)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.32.1")
    with pytest.raises(ValueError, match=r"vLLM is 0.32.1; soft tokens need 0.31"):
        options.check_vllm()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.31.0")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="VLLM_USE_V2_MODEL_RUNNER is 0: soft tokens need Model Runner V2"):
        options.check_vllm()


def test_architectures_that_make_no_text(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["T5ForConditionalGeneration"]}')
    with pytest.raises(ValueError, match="has the architecture T5ForConditionalGeneration"):
        options.soft_architecture(str(tmp_path))


def test_an_adapter_is_refused(tmp_path, folder):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder)}))
    with pytest.raises(ValueError, match="is an adapter, and vLLM loads whole models"):
        command(str(adapter), [])


def test_the_table_of_engines_decides(folder, thinking, monkeypatch):
    values = {"dataset": "chain_sum", "output_dir": "x", "eval_samples": 1}
    for engine, facts in ENGINES.items():
        asked = values | {"engine": engine, "control": "zero"}
        if facts.controls:
            load_command("eval", str(folder), asked)
        else:
            with pytest.raises(ValueError, match=f"control zero is not available with engine {engine}"):
                load_command("eval", str(folder), asked)
    assert load_command("eval", str(folder), values | {"server": "http://x"})[0].engine == "vllm"
    assert all(set(kind.engines) <= set(ENGINES) for kind in KINDS.values())
    kind = type(thinking.kind)(**{**vars(thinking.kind), "engines": ("ours",)})
    monkeypatch.setitem(KINDS, thinking.thought, kind)
    layout = Layout(thinking, policy.load_policy(str(folder)).tokenizer)
    with pytest.raises(ValueError, match=f"thought {thinking.thought} is not available with engine vllm"):
        roll_of("vllm", None, str(folder), "float32", [layout], ["1+1="])


def test_a_described_policy_is_the_loaded_one_without_weights(folder):
    loaded, described = policy.load_policy(str(folder)), describe_policy(str(folder))
    assert described.thinking == loaded.thinking and described.model.device.type == "meta"
    assert described.tokenizer.get_vocab() == loaded.tokenizer.get_vocab()
    for describe in (policy.context_length, lambda model: policy.eos_token_ids(model, loaded.tokenizer)):
        assert describe(described.model) == describe(loaded.model)


def test_a_model_is_known_wherever_it_lies(folder, tmp_path):
    here = identity(str(folder))
    folder.rename(tmp_path / "elsewhere")
    assert identity(str(tmp_path / "elsewhere")) == here
    weights = tmp_path / "elsewhere/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert identity(str(tmp_path / "elsewhere"))["weights"] != here["weights"]


class Elsewhere:
    """An engine that makes a rollout whole, as vLLM does."""

    def __init__(self, model):
        self.model = model

    def rollout(self, layout, prompt_ids, seeds, eos_ids, decoding):
        return rollout(self.model, layout, prompt_ids, seeds, eos_ids, decoding=decoding)


def test_completions_and_their_positions_are_told_as_with_our_engine(folder):
    loaded = policy.load_policy(str(folder))
    layout = Layout(loaded.thinking, loaded.tokenizer)
    tasks, told = [Task("a", "1+2=", 0), Task("a", "1+2=", 1), Task("b", "3=", 0)], []
    described = describe_policy(str(folder)).model
    for model, roll in ((loaded.model, rollout), (described, OnVllm(Elsewhere(loaded.model)))):
        found, stream = [], []
        complete(model, layout, tasks, None, 5, 2, found.append, lambda *x, to=stream: to.append(x), roll)
        told.append((found, stream))
    assert told[0] == told[1] and len(told[0][0]) == 3
    with pytest.raises(ValueError, match="control zero is not available with engine vllm"):
        OnVllm(Elsewhere(loaded.model))(described, layout, [[5]], control="zero")
