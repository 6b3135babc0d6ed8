"""Imports go one way: see docs/architecture.md.

pytest tests/test_imports.py
"""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ALLOWED = {  # module -> modules of ours that it may import
    "passk": set(),
    "records": set(),
    "noise": set(),
    "data": set(),
    "densities": {"noise"},
    "head": {"densities", "kernels"},
    "kernels": set(),
    "layout": {"data"},
    "kl": {"densities", "head"},
    "policy": {"densities", "head", "layout", "noise", "projector"},
    "projector": set(),
    "scored": {"head", "kl", "layout", "policy", "value_head"},
    "walk": {"densities", "layout", "noise", "policy"},
    "cache": set(),
    "graphs": set(),
    "rollout": {"cache", "graphs", "layout", "policy", "walk"},
    "estimate": {"config", "policy", "train"},
    "config": {"layout"},
    "codi": {"config", "data", "layout", "noise", "policy", "projector", "supervised"},
    "callbacks": set(),
    "supervised": {"data", "layout"},
    "sft": {"config", "data", "layout", "supervised"},
    "icot": {"config", "data", "layout", "noise", "supervised"},
    "coconut": {"config", "data", "layout", "noise", "policy", "supervised"},
    "probe": {"data", "layout", "policy", "records", "supervised"},
    "cost": {"data", "evaluate", "layout", "passk", "records"},
    "analyze_command": {
        "config",
        "cost",
        "data",
        "eval_command",
        "evaluate",
        "layout",
        "probe",
        "records",
        "supervised",
        "train",
    },
    "guards": {"records"},
    "clock": set(),
    "rl": {"clock", "guards", "layout", "noise", "projector", "rollout", "scored"},
    "ppo": {"rl", "value_head"},
    "value_head": set(),
    "evaluate": {"data", "layout", "noise", "records", "rollout"},
    "eval_command": {"config", "data", "evaluate", "layout", "policy", "records", "report", "supervised", "train"},
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
    if path.stem not in ("figures", "analysis"):
        assert not any(n.split(".")[0] == "matplotlib" for n in names)


@pytest.mark.parametrize(
    "module", ["rl_soft.passk", "rl_soft.records", "rl_soft.report", "rewards.accuracy", "rewards.code"]
)
def test_reports_and_rewards_work_without_torch(module):
    code = f"import sys; sys.modules['torch'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_telemetry_is_off():
    code = "import os, rl_soft.cli as c; c.main(['--help']); assert os.environ['HF_HUB_DISABLE_TELEMETRY'] == '1'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT, capture_output=True)
