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
    "walk": {"decoding", "densities", "layout", "noise", "policy"},
    "cache": set(),
    "graphs": set(),
    "rollout": {"cache", "decoding", "graphs", "layout", "policy", "walk"},
    "estimate": {"config", "policy", "train"},
    "arguments": {"layout"},
    "config": {"arguments", "decoding", "layout"},
    "codi": {"arguments", "config", "data", "layout", "noise", "policy", "projector", "supervised"},
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
    "rl": {"clock", "guards", "layout", "noise", "projector", "rollout", "scored", "side_modules"},
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


@pytest.mark.parametrize(
    "module",
    [
        "rl_soft",
        "rl_soft.passk",
        "rl_soft.records",
        "rl_soft.report",
        "rl_soft.config",
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
