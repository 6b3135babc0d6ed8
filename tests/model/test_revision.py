"""A revision of a hub id reaches what loads the tokenizer and the weights.

pytest tests/model/test_revision.py
"""

import pytest
from conftest import tiny_policy

from rl_soft.config.recipe import load_command, make_recipe
from rl_soft.model import policy
from rl_soft.model import tokenizer as tokenizers
from rl_soft.train.start import lora_config, starting_policy


@pytest.fixture
def asked(monkeypatch):
    """(name, revision) of each thing that is loaded."""
    seen, made = [], tiny_policy()

    def load(thing):
        def from_pretrained(name, revision=None, **kwargs):
            seen.append((name, revision))
            return thing

        return from_pretrained

    monkeypatch.setattr(policy.AutoModelForCausalLM, "from_pretrained", load(made.model))
    monkeypatch.setattr(tokenizers.AutoTokenizer, "from_pretrained", load(made.tokenizer))
    return seen


def test_it_reaches_the_tokenizer_and_the_weights_of_a_recipe(tmp_path, asked):
    values = {"method": "grpo", "output_dir": "x", "dataset": "gsm8k", "model_name_or_path": "me/model"}
    recipe = make_recipe(tmp_path / "r.yaml", {**values, "model_revision": "v1", "use_peft": True})
    starting_policy(recipe, None)
    assert asked == [("me/model", "v1")] * 2
    assert lora_config(recipe).revision == "v1", "the adapter says of which base it is"
    asked.clear()
    policy.load_policy("me/model")
    assert {revision for _, revision in asked} == {"main"}


def test_a_command_takes_it_and_a_folder_or_another_engine_does_not(tmp_path, asked):
    given = {"dataset": "gsm8k", "output_dir": "x", "model_revision": "v1"}
    assert load_command("eval", "me/model", given)[0].model_revision == "v1"
    with pytest.raises(ValueError, match="model_revision 'v1' is not available with engine vllm; fetch it"):
        load_command("eval", "me/model", {**given, "engine": "vllm"})
    with pytest.raises(ValueError, match=r"model_revision 'v1' is for a hub id, and .* is a folder; leave it out"):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "tokenizer.json").write_text("{}")
        policy.load_policy(str(tmp_path), revision="v1")
