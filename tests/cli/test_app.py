"""`--help`: every key of a command, with its default, at once and without torch.

pytest tests/cli/test_app.py
"""

import dataclasses
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

from rl_soft.analyses.run import DEFAULTS
from rl_soft.cli import main
from rl_soft.cli.generate import CAPS
from rl_soft.cli.help import COMMANDS, HOSTS, MODEL_GROUPS
from rl_soft.config.recipe import GROUPS, METHODS, load_decoder, load_evaluation, trainer_class, trainer_defaults

RECIPES = {method: f"recipes/{name}.yaml" for method, name in
           [("codi", "codi"), ("sft", "sft_cot"), ("icot", "icot"), ("coconut", "coconut"), ("grpo", "grpo_gumbel"),
            ("ppo", "ppo_gumbel")]}  # fmt: skip


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a command prints for a width of the terminal, and no error."""
    monkeypatch.chdir(ROOT)

    def run(*words, columns=80):
        monkeypatch.setenv("COLUMNS", str(columns))
        main(list(words))
        captured = capsys.readouterr()
        assert captured.err == "" and max(len(line) for line in captured.out.splitlines()) <= columns
        return captured.out

    return run


def assert_keys(text, groups):
    """Help and default of each field stand at its key; the default is YAML that a recipe could hold."""
    keys = re.findall(r"^  --(\w+) +(.*?)(?=\n  -|\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    keys = [(name, " ".join(entry.split())) for name, entry in keys]
    for group in groups:
        for f in dataclasses.fields(group):
            if f.name == "model_name_or_path" and f.default == "":
                assert "\n  MODEL " in text
                continue
            entries = [entry for name, entry in keys if name == f.name]
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            lead = f"{' '.join(f.metadata['help'].split())} (default "
            entry = next(entry for entry in entries if entry.startswith(lead))
            assert yaml.safe_load(entry[len(lead) : -1]) == default and entry.endswith(")")
    assert {name for name, _ in keys} <= {f.name for group in groups for f in dataclasses.fields(group)}


@pytest.mark.parametrize("command", MODEL_GROUPS)
def test_a_command_on_a_model_shows_every_key_that_it_takes(command, shown):
    assert_keys(shown(command, "--help"), MODEL_GROUPS[command])
    assert shown(command, "MODEL", "--help") == shown(command, "-h")


@pytest.mark.parametrize("command", MODEL_GROUPS)
def test_the_keys_shown_are_those_that_are_taken(command):
    """A command refuses an unknown key by its list of known ones: the groups of the help."""
    load = load_evaluation if command == "analyze" else load_decoder
    with pytest.raises(ValueError, match="known: ") as error:
        load("MODEL", {"0123456789": 1}, MODEL_GROUPS[command][0], command)
    known = str(error.value).partition("known: ")[2].split(", ")
    assert set(known) == {f.name for group in MODEL_GROUPS[command] for f in dataclasses.fields(group)}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_shows_the_keys_of_its_method(method, shown):
    text = shown(RECIPES[method], "--help")
    assert_keys(text, GROUPS[method])
    assert shown("train", RECIPES[method], "--learning_rate", "1", "-h") == text
    host = next(host for host, methods in HOSTS.items() if method in methods)
    assert f"{host} ({method})" in " ".join(text.split()) and host.split()[1] == trainer_class(method).__name__


@pytest.mark.parametrize("command", ["train", "check", "estimate"])
def test_without_a_recipe_the_keys_of_all_methods_are_shown(command, shown):
    assert_keys(
        shown(command, "--help", columns=200 if command == "check" else 70), [g for m in METHODS for g in GROUPS[m]]
    )


def test_help_names_every_command_in_a_line_and_each_command_answers(shown):
    lines = shown("--help", columns=90).splitlines()
    assert len(lines) == len(COMMANDS) + 4
    for name, (what, _) in COMMANDS.items():
        assert [line.split(maxsplit=1) for line in lines if line.startswith(f"  {name} ")] == [[name, what]]
        assert shown(name, "--help").startswith(f"usage: rl-soft {name}")
    assert shown("check", "eval", "MODEL", "--help") == shown("eval", "--help")


def test_defaults_for_the_models_of_others_are_told(shown):
    text = " ".join(shown("generate", "--help").split())
    assert f"num_thoughts is {CAPS['num_thoughts']} and its max_answer_tokens {CAPS['max_answer_tokens']}" in text
    page = (ROOT / "docs/analyses.md").read_text()
    assert DEFAULTS["end_of_thinking"] in page and f"{DEFAULTS['num_thoughts']} thoughts" in page


def test_a_recipe_that_is_not_there_is_named(shown, capsys):
    with pytest.raises(SystemExit) as stop:
        shown("recipes/grpo_gumble.yaml", "--help")
    assert stop.value.code == 2 and "did you mean recipes/grpo_gumbel.yaml" in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; from rl_soft.cli import main\n"
        f"for command in {list(COMMANDS)}: main([command, '--help'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, capture_output=True)


@pytest.mark.parametrize("words", [["recipes/codi.yaml", "--zero", "3", "--help"], ["eval", "--help"], ["eval", "-h"]])
def test_launch_sh_passes_help_on(words, shown):
    if not (ROOT / ".venv/.rl_soft").exists():
        pytest.skip("launch.sh would install first")
    run = subprocess.run([ROOT / "launch.sh", *words], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0 and "[launch]" not in run.stdout and "\n  --eval_samples " in run.stdout


def test_the_page_has_the_defaults_of_the_trainer():
    """docs/grpo.md, key by key, of every method."""
    table = (ROOT / "docs/grpo.md").read_text().partition("## Defaults of the trainer")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| `")]
    shown = {
        key: yaml.safe_load(value.strip().strip("`"))
        for keys, values in rows
        for key, value in zip(re.findall(r"`(\w+)`", keys), values.split(","), strict=True)
    }
    assert shown == trainer_defaults("grpo") | trainer_defaults("codi")
