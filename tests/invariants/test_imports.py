"""Imports go one way: see docs/architecture.md.

pytest tests/invariants/test_imports.py
"""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

FLOORS = [  # a wing imports wings on the rows below its own; wings of one row never import each other
    {"cli"},
    {"train", "analyses"},
    {"evaluation"},
    {"rollouts"},
    {"config", "model"},
    {"thoughts"},
    {"data", "files", "rewards"},
    {"keys"},
]
FLOOR = {wing: len(FLOORS) - i for i, floor in enumerate(FLOORS) for wing in floor}


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


LONE = [ROOT / "rl_soft/files.py", ROOT / "rl_soft/keys.py"]
FILES = sorted([*(ROOT / "rl_soft").glob("*/**/*.py"), *LONE, *(ROOT / "rewards").glob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_direction(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    wing = parts[1] if parts[0] == "rl_soft" else parts[0]
    names = imported(path)
    for name in names:
        top, _, rest = name.partition(".")
        to = rest.split(".")[0] if top == "rl_soft" else top
        if to in FLOOR and to != wing:
            assert FLOOR[to] < FLOOR[wing], f"{wing} imports {name}"
    tops = {name.split(".")[0] for name in names}
    assert "trl" not in tops or wing in ("train", "config")
    assert "matplotlib" not in tops or path.stem == "figures"
    assert wing != "rewards" or not tops & {"rl_soft", "torch"}


@pytest.mark.parametrize(
    "module",
    [
        "rl_soft",
        "rl_soft.evaluation.passk",
        "rl_soft.evaluation.records",
        "rl_soft.evaluation.report",
        "rl_soft.config.recipe",
        "rl_soft.cli.app",
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
        ("", "train.pipeline", None, "1 True"),
        ("import trl", "train.grpo", None, "1 True"),  # TRL first, which reads the variable
        ("import trl", "train.grpo", "0", "0 False"),  # the user's own word stays
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
