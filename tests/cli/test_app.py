"""The command line: help with every key, its default and what it takes; at once and without torch.

pytest tests/cli/test_app.py
"""

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import yaml
from conftest import ROOT

from rl_soft.analyses.run import DEFAULTS
from rl_soft.cli import app, main
from rl_soft.cli.generate import CAPS
from rl_soft.config import trainers
from rl_soft.config.commands import EstimateArguments
from rl_soft.config.reading import bundled_recipes
from rl_soft.config.recipe import COMMANDS, GROUPS, METHODS, load_command, trainer_defaults
from rl_soft.keys import fields, takes

NAMES = [command.name or command.callback.__name__ for command in app.app.registered_commands]
RECIPES = {method: f"recipes/{name}.yaml" for method, name in
           [("codi", "codi"), ("sft", "sft_cot"), ("icot", "icot"), ("coconut", "coconut"), ("grpo", "grpo_gumbel"),
            ("ppo", "ppo_gumbel")]}  # fmt: skip


@pytest.fixture
def shown(monkeypatch, capsys):
    """What a command prints for a width of the terminal, and no error."""
    monkeypatch.chdir(ROOT)

    def run(*words, columns=1000):
        monkeypatch.setenv("COLUMNS", str(columns))
        main(list(words))
        captured = capsys.readouterr()
        assert captured.err == "" and max(len(line) for line in captured.out.splitlines()) <= columns
        return captured.out

    return run


def assert_keys(text, groups):
    """Help, what it takes and default of each field stand at its key; the default is YAML that a recipe could hold."""
    entries = re.findall(r"^│ --(\w+) +(.*?) *│$", text, re.MULTILINE)
    known = {}
    for group in groups:
        for name, field in fields(group).items():
            known[name] = True
            default = field.get_default(call_default_factory=True)
            if name == "model_name_or_path" and default == "":
                assert re.search("^│ .*MODEL ", text, re.MULTILINE)
                continue
            lead = f"{' '.join(field.description.split())} ({takes(field)}; default "
            entry = next(entry for key, entry in entries if key == name and entry.startswith(lead))
            assert yaml.safe_load(entry[len(lead) : -1]) == default and entry.endswith(")")
    assert {name for name, _ in entries} - {"help"} <= known.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_model_shows_every_key_that_it_takes(command, shown):
    text = shown(command, "--help")
    assert_keys(text, COMMANDS[command])
    assert shown(command, "MODEL", "--help") == shown(command, "-h") == text
    assert shown(command, "--help", columns=80)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_keys_shown_are_those_that_are_taken(command):
    """A command refuses an unknown key by its list of known ones: the groups of the help."""
    with pytest.raises(ValueError, match="known: ") as error:
        load_command(command, "MODEL", {"0123456789": 1})
    known = str(error.value).partition("known: ")[2].splitlines()[0].split(", ")
    assert set(known) == {name for group in COMMANDS[command] for name in fields(group)}


@pytest.mark.parametrize("method", METHODS)
def test_a_recipe_shows_the_keys_of_its_method(method, shown):
    text = shown(RECIPES[method], "--help")
    assert_keys(text, GROUPS[method])
    assert shown("train", RECIPES[method], "--learning_rate", "1", "-h") == text
    assert shown("train", RECIPES[method].removeprefix("recipes/").removesuffix(".yaml"), "--help") == text
    assert f"{'.'.join(trainers.CLASSES[method])} ({method})" in text


@pytest.mark.parametrize("command", ["train", "check", "estimate"])
def test_without_a_recipe_the_keys_of_all_methods_are_shown(command, shown):
    own = [EstimateArguments] if command == "estimate" else []
    assert_keys(shown(command, "--help"), [*own, *(g for m in METHODS for g in GROUPS[m])])


def test_help_names_every_command_and_each_command_answers(shown):
    text = shown("--help", columns=90)
    for name in NAMES:
        assert re.search(rf"^│ {name} +\w+", text, re.MULTILINE)
        assert f"Usage: rl-soft {name}" in shown(name, "--help")
    assert shown("check", "eval", "MODEL", "--help") == shown("eval", "--help")
    assert shown() == shown("--help")


def test_the_shell_completes_commands_and_keys():
    def completed(words, at):
        env = {"_RL_SOFT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        command = [sys.executable, "-m", "rl_soft"]
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=ROOT, check=True)
        return run.stdout.split()

    assert completed("rl-soft ev", 1) == ["eval"]
    assert completed("rl-soft train grpo_gumbel --thought_ep", 3) == ["--thought_epsilon"]
    assert "--top_p" in completed("rl-soft generate MODEL --top_", 3)


def test_defaults_for_the_models_of_others_are_told(shown):
    text = " ".join(shown("generate", "--help").split())
    assert f"num_thoughts is {CAPS['num_thoughts']} and max_answer_tokens is {CAPS['max_answer_tokens']}" in text
    page = (ROOT / "docs/analyses.md").read_text()
    assert DEFAULTS["end_of_thinking"] in page and f"{DEFAULTS['num_thoughts']} thoughts" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes/grpo_gumble.yaml", "--help"], "did you mean recipes/grpo_gumbel.yaml?"),
        (["train", "grpo_gumble"], "recipe grpo_gumble does not exist; did you mean grpo_gumbel?"),
        (["train", "smollm/grpo_gumbel"], "did you mean smollm2/grpo_gumbel?"),
        (["train"], "train needs RECIPE as its first argument"),
        (["train", "--seed", "1", "grpo_gumbel"], "train needs RECIPE as its first argument"),
        (["train", "grpo_gumbel", "surplus"], "expected --key value, got 'surplus'"),
        (["train", "grpo_gumbel", "--thought_k", "'3'"], "thought_k must be a whole number, at least 0, got '3'"),
        (["train", "grpo_gumbel", "--thought", "-gumbel"], "got '-gumbel'; did you mean gumbel?"),
        (["report"], "Missing argument 'RUN'"),
        (["compare", "a"], "Missing option '--out'"),
        (["compare", "a", "--uot", "b"], "No such option: --uot"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(words, message, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        main(words)
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith("rl_soft: error: ") and message in said.err


def test_the_traceback_is_shown_where_it_is_asked_for(monkeypatch):
    monkeypatch.setenv("RL_SOFT_DEBUG", "1")
    with pytest.raises(ValueError, match="recipe nothing does not exist"):
        main(["train", "nothing"])


def test_a_reader_that_has_enough_is_no_error():
    run = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -u -m rl_soft recipes | (read -r line; sleep 0.1; exit 0)"],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert run.stderr == "" and run.returncode in (0, 1)


def test_the_bundled_recipes_are_listed_with_their_first_sentence(shown):
    lines = shown("recipes").splitlines()
    assert [line.split()[0] for line in lines] == list(bundled_recipes())
    assert sum(1 for path in (ROOT / "recipes").rglob("*.yaml") if path.parent.name != "accelerate") == len(lines)
    text = (ROOT / "recipes/smollm2/grpo_gumbel.yaml").read_text()
    sentence = next(line for line in lines if line.startswith("smollm2/grpo_gumbel")).split(maxsplit=1)[1]
    assert sentence.endswith(".") and sentence in " ".join(text.replace("\n# ", " ").split())


def test_help_and_a_mistake_need_no_torch():
    code = (
        "import sys, contextlib; sys.modules['torch'] = sys.modules['transformers'] = sys.modules['trl'] = None\n"
        "from rl_soft.cli import main\n"
        f"for command in {NAMES}: main([command, '--help'])\n"
        "for words in [['train', 'grpo_gumbel', '--thought_k', '-1'], ['train', 'codi', '--max_step', '1'],\n"
        "              ['eval', 'm', '--dataset', 'd', '--output_dir', 'o', '--top_p', '2'], ['generate', 'm'],\n"
        "              ['analyze', 'probe', 'm']]:\n"
        "    with contextlib.suppress(SystemExit): main(words)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, capture_output=True, text=True
    )
    assert len(re.findall("^rl_soft: error", run.stderr, re.MULTILINE)) == 5, run.stderr


@pytest.mark.parametrize("words", [["recipes/codi.yaml", "--zero", "3", "--help"], ["eval", "--help"], ["eval", "-h"]])
def test_launch_sh_passes_help_on(words):
    if not (ROOT / ".venv/.rl_soft").exists():
        pytest.skip("launch.sh would install first")
    run = subprocess.run([ROOT / "launch.sh", *words], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert run.returncode == 0 and "[launch]" not in run.stdout and " --eval_samples " in run.stdout


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


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, "rl_soft: stopped; the same command goes on with what is missing"),
        (
            OSError(28, "No space left on device"),
            2,
            "rl_soft: error: the disk is full",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 15040"), 2, "the disk is full"),
        (ImportError("install `bitsandbytes`"), 2, "rl_soft: error: install `bitsandbytes`"),
        (ValueError("a mistake"), 2, "rl_soft: error: a mistake"),
    ],
)
def test_what_a_user_can_mend_ends_in_one_line(error, code, line, monkeypatch, capsys):
    from rl_soft.train import pipeline

    def run(recipe):
        raise error

    monkeypatch.setattr(pipeline, "run", run)
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(ROOT / "recipes/grpo_gumbel.yaml")])
    said = capsys.readouterr().err
    assert stopped.value.code == code and line in said and said.count("\n") == 1


def test_an_error_of_ours_keeps_its_traceback(monkeypatch):
    from rl_soft.train import pipeline

    monkeypatch.setattr(pipeline, "run", lambda recipe: {}["missing"])
    with pytest.raises(KeyError):
        main(["train", str(ROOT / "recipes/grpo_gumbel.yaml")])


@pytest.mark.parametrize(("end", "left"), [(None, True), (SystemExit(130), True), (SystemExit(1), False)])
def test_the_processes_leave_their_group_when_all_of_them_end(end, left, monkeypatch):
    from torch import distributed

    from rl_soft.train import pipeline

    def run(recipe):
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        if end is not None:
            raise end

    monkeypatch.setattr(pipeline, "run", run)
    try:
        with pytest.raises(SystemExit) if end is not None else nullcontext():
            main(["train", str(ROOT / "recipes/grpo_gumbel.yaml")])
        assert distributed.is_initialized() != left
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


@pytest.mark.parametrize(("load", "policy"), [(0.1, None), (1000.0, "PASSIVE")])
def test_threads_sleep_where_other_work_wants_the_cores(load, policy, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, load, load))
    app.share_cores()
    assert os.environ.pop("OMP_WAIT_POLICY", None) == policy


@pytest.mark.parametrize(
    ("given", "vllm", "becomes"),
    [(None, False, "expandable_segments:True"), ("backend:native", False, None), (None, True, None)],
)
def test_the_allocator_takes_segments_that_grow_where_nothing_else_is_set(monkeypatch, capsys, given, vllm, becomes):
    for name in app.ALLOCATOR:
        monkeypatch.setenv(name, "")  # so that it is as before in the end
        monkeypatch.delenv(name)
    if given:
        monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", given)
    find = app.importlib.util.find_spec
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda n: object() if vllm and n == "vllm" else find(n))
    main(["recipes"])
    assert app.os.environ.get("PYTORCH_ALLOC_CONF") == becomes
    capsys.readouterr()


def test_lm_eval_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["lm-eval", "--tasks", "gsm8k"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.endswith("lm-eval is not installed: pip install 'rl-soft[lm-eval]'")
