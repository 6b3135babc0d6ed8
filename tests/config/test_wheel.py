"""A wheel holds every file that a run needs: it works where there is no clone.

pytest -m slow tests/config/test_wheel.py
"""

import shutil
import subprocess
import sys
import zipfile

import pytest
from conftest import ROOT

PARTS = ("pyproject.toml", "README.md", "LICENSE", "rl_soft", "rewards", "recipes")


@pytest.mark.slow
def test_a_wheel_is_whole_and_lists_its_recipes(tmp_path):
    source = tmp_path / "source"
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            source.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "-q", str(source), "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "-w", str(tmp_path)], check=True, timeout=300, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    sources = [path for top in ("rl_soft", "rewards") for path in (ROOT / top).rglob("*.[pc]*")]
    needed = {str(p.relative_to(ROOT)) for p in sources if p.suffix in (".py", ".c")}
    recipes = {f"rl_soft/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
    assert "rl_soft/rollouts/kernels/cpu.c" in needed and "rl_soft/recipes/smollm2/grpo_gumbel.yaml" in recipes
    assert needed | recipes == {name for name in held if not name.startswith("rl_soft-")}

    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'installed')!r})\n"
        "from rl_soft.config.reading import find_recipe\n"
        "from rl_soft.config.recipe import load_recipe\n"
        "recipe = load_recipe('grpo_gumbel')\n"
        "print(recipe.path); print(find_recipe(recipe.model.warm_start, recipe.path))"
    )
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True, cwd=tmp_path / "empty")
    folder = tmp_path / "installed/rl_soft/recipes"
    assert run.stdout.split() == [str(folder / "grpo_gumbel.yaml"), str(folder / "codi.yaml")]
