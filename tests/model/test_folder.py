"""What a model's path leads to: taken, or told for what it is with the remedy; torch is not needed.

pytest tests/model/test_folder.py
"""

import json

import pytest

from rl_soft.model.folder import model_folder


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Files by name; a working folder."""
    monkeypatch.chdir(tmp_path)

    def make(*files):
        for file in files:
            path = tmp_path / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"base_model_name_or_path": "base"}) if "adapter" in path.name else "{}")

    return make


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ((), "models/nothing", "model folder models/nothing does not exist"),
        ((), "./smollm2", "does not exist; run `rl-soft fetch smollm2` first"),
        (("m.gguf",), "m.gguf", r"model m.gguf is a GGUF file.*from_pretrained\('.', gguf_file='m.gguf'\)"),
        (("m/x-Q4.gguf",), "m", r"is a GGUF file.*gguf_file='x-Q4.gguf'"),
        (("m.bin",), "m.bin", "model m.bin is a file; name the folder"),
        (("runs/x/config.yaml",), "runs/x", "run runs/x has no model yet; the command that started it goes on"),
        (("m/notes.txt",), "m", "folder m holds no model: it has neither config.json nor adapter_config.json$"),
        (("m/v2/config.json",), "m", "holds no model.*; one is in m/v2"),
        (("m/config.json", "m/tokenizer_config.json"), "m", "model m has no tokenizer.*AutoTokenizer.from_pretrained"),
        (("a/adapter_config.json", "elsewhere/x"), "a", None),  # its base may be on the hub
        (("m/config.json", "m/tokenizer.json"), "m", None),
        (("m/config.json", "m/vocab.txt"), "m", None),
        ((), "owner/name", None),
    ],
)
def test_a_path_is_told_for_what_it_is(made, files, name, message):
    made(*files)
    if message is None:
        assert model_folder(name) == name
        return
    with pytest.raises(ValueError, match=message):
        model_folder(name)


def test_a_run_means_its_model(made):
    made("runs/x/config.yaml", "runs/x/model/config.json", "runs/x/model/tokenizer.json")
    assert model_folder("runs/x") == model_folder("runs/x/model") == "runs/x/model"


def test_the_base_of_an_adapter_is_looked_for_before_anything_is_loaded(made, tmp_path):
    made("a/adapter_config.json")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "models/gone"}))
    with pytest.raises(ValueError, match=r"base models/gone does not exist.*set base_model_name_or_path"):
        model_folder("a")
    made("models/gone/config.json")
    assert model_folder("a") == "a"
