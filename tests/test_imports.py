"""Imports go one way: see docs/architecture.md.

pytest tests/test_imports.py
"""

import ast
import os
import re
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from conftest import ROOT

ALLOWED = {  # module -> modules of ours that it may import
    "passk": set(),
    "records": set(),
    "noise": set(),
    "row": set(),
    "equations": set(),
    "generated": {"equations", "row"},
    "stored": {"equations", "row"},
    "data": {"generated", "row", "stored"},
    "densities": {"noise"},
    "head": {"densities", "kernels"},
    "kernels": set(),
    "layout": {"data"},
    "kl": {"densities", "head"},
    "policy": {"densities", "head", "layout", "noise", "projector", "side_modules"},
    "side_modules": set(),
    "projector": {"side_modules"},
    "scored": {"head", "kl", "layout", "policy", "value_head"},
    "decoding": {"layout"},
    "walk": {"decoding", "densities", "layout", "noise", "policy", "sampling"},
    "cache": set(),
    "graphs": set(),
    "layers": set(),
    "cpu_kernels": {"layers"},
    "gpu_sampling": {"kernels", "noise"},
    "gpu_kernels": {"gpu_sampling", "kernels", "layers", "noise"},
    "sampling": {"cpu_kernels", "gpu_kernels", "gpu_sampling", "noise"},
    "rollout": {
        "cache",
        "cpu_kernels",
        "decoding",
        "gpu_kernels",
        "graphs",
        "layout",
        "policy",
        "walk",
    },
    "estimate": {"config", "policy", "rollout", "train"},
    "arguments": {"layout"},
    "refusals": {"arguments", "layout"},
    "config": {"arguments", "decoding", "layout", "refusals"},
    "reward_entries": set(),
    "help": {"arguments", "config", "decoding", "layout"},
    "codi": {"arguments", "config", "data", "layout", "noise", "policy", "projector", "refusals", "supervised"},
    "callbacks": set(),
    "supervised": {"data", "layout"},
    "sft": {"arguments", "data", "layout", "supervised"},
    "icot": {"arguments", "data", "noise", "supervised"},
    "coconut": {"arguments", "data", "noise", "policy", "projector", "supervised"},
    "probe": {"data", "layout", "policy", "records", "supervised"},
    "cost": {"data", "evaluate", "layout", "passk", "records"},
    "journal": set(),
    "findings": set(),
    "rouge": set(),
    "alternatives": {"rollout", "walk"},
    "branching": {"alternatives", "data", "evaluate", "findings", "layout", "walk"},
    "lens": {"alternatives", "data", "evaluate", "findings", "layout", "policy", "walk"},
    "traces": {"data", "evaluate", "findings", "layout", "noise", "passk", "rollout", "rouge"},
    "plane": {"branching", "data", "densities", "evaluate", "findings", "layout", "noise", "rollout"},
    "analysis_figures": {"branching", "figures", "findings", "plane"},
    "analysis_run": {
        "analysis_figures",
        "arguments",
        "branching",
        "data",
        "findings",
        "journal",
        "layout",
        "lens",
        "plane",
        "records",
        "traces",
    },
    "analysis_report": {
        "analysis_run",
        "arguments",
        "data",
        "evaluate",
        "findings",
        "html",
        "layout",
        "records",
        "render",
        "report",
        "rouge",
    },
    "analyze_command": {
        "analysis_report",
        "analysis_run",
        "arguments",
        "config",
        "cost",
        "data",
        "eval_command",
        "evaluate",
        "generation",
        "layout",
        "policy",
        "probe",
        "processes",
        "records",
        "supervised",
    },
    "processes": set(),
    "guards": {"records"},
    "clock": set(),
    "rl": {"clock", "guards", "layout", "noise", "projector", "refusals", "rollout", "scored", "side_modules"},
    "ppo": {"arguments", "rl", "side_modules", "value_head"},
    "value_head": {"side_modules"},
    "evaluate": {"data", "decoding", "generated", "layout", "noise", "records", "rollout"},
    "eval_command": {
        "arguments",
        "config",
        "data",
        "decoding",
        "evaluate",
        "generation",
        "layout",
        "policy",
        "processes",
        "records",
        "report",
        "supervised",
    },
    "generation": {"decoding", "evaluate", "layout", "noise", "records", "rollout", "supervised"},
    "terminal": {"generation", "records"},
    "generate_command": {"arguments", "config", "eval_command", "generation", "policy", "records", "row", "terminal"},
    "html": {"passk", "records"},
    "render": set(),
    "figures": {"render"},
    "report": {"figures", "html", "passk", "records", "render"},
    "fetch": set(),
}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "rl_soft").glob("*.py")), ids=lambda p: p.stem)
def test_direction(path):
    names = imported(path)
    ours = {n.split(".")[1] for n in names if n.startswith("rl_soft.")}
    if path.stem in ALLOWED:
        assert ours <= ALLOWED[path.stem]
    if path.stem not in ("cli", "__main__"):
        assert "cli" not in ours
    if path.stem not in ("rl", "ppo", "sft", "config", "train"):
        assert not any(n.split(".")[0] == "trl" for n in names)
    if path.stem not in ("figures", "analysis_figures"):
        assert not any(n.split(".")[0] == "matplotlib" for n in names)


def test_the_pages_show_every_module_and_what_it_imports():
    page = (ROOT / "docs/architecture.md").read_text()
    tree = [word for word in (ROOT / "README.md").read_text().split() if word.endswith(".py")]
    modules = {path.stem for path in (ROOT / "rl_soft").glob("*.py")} - {"__init__", "__main__"}
    for module in modules:
        assert f"{module}.py" in page, module
        assert any(fnmatch(f"{module}.py", word) for word in tree), module
    for row in re.findall(r"^\| (`.*\.py`) \|.*\| (.*) ?\|$", page, re.MULTILINE):
        files, shown = re.findall(r"(\w+)\.py", row[0]), set(re.findall(r"\w+", row[1])) & modules
        if files not in (["train"], ["cli"]):
            assert shown - set(files) == set().union(*(ALLOWED[file] for file in files)) - set(files), files


@pytest.mark.parametrize(
    "module",
    [
        "rl_soft",
        "rl_soft.passk",
        "rl_soft.records",
        "rl_soft.report",
        "rl_soft.config",
        "rl_soft.help",
        "rewards.accuracy",
        "rewards.code",
    ],
)
def test_reports_and_rewards_work_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_telemetry_is_off():
    code = "import os, rl_soft.cli as c; c.main(['--help']); assert os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, capture_output=True)


TRAINED_IN_PYTHON = """
import os
{first}
import rl_soft.{module}
from huggingface_hub import constants
print(os.environ["HF_HUB_DISABLE_TELEMETRY"], constants.HF_HUB_DISABLE_TELEMETRY)
"""


@pytest.mark.parametrize(
    ("first", "module", "asked", "found"),
    [
        ("", "train", None, "1 True"),
        ("import trl", "rl", None, "1 True"),  # TRL first, which reads the variable
        ("import trl", "rl", "0", "0 False"),  # the user's own word stays
    ],
)
def test_telemetry_is_off_in_python_too(first, module, asked, found):
    env = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_DISABLE_TELEMETRY", "DISABLE_TELEMETRY")}
    if asked is not None:
        env["HF_HUB_DISABLE_TELEMETRY"] = asked
    code = TRAINED_IN_PYTHON.format(first=first, module=module)
    run = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT, capture_output=True, text=True, env=env
    )
    assert run.stdout.strip() == found
