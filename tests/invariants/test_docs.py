"""README.md and docs/: links lead somewhere, pages stay short, commands have keys that exist.

pytest tests/invariants/test_docs.py
"""

import contextlib
import functools
import io
import re
import shlex

import pytest
from conftest import ROOT

from rl_soft.cli import main
from rl_soft.config.reading import parse_overrides
from rl_soft.config.recipe import load_recipe

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:\./launch\.sh|rl-soft|-m rl_soft) +([^\n`|]+)")
LAUNCH = {"zero", "fsdp", "nproc", "dry-run", "help", "vllm"}  # of launch.sh, not of rl-soft
SHELL = {"$s": "1", "$d": "chain_sum"}  # variables of loops


def plain(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def anchors(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return {plain(line.lstrip("# ")) for line in text.splitlines() if line.startswith("#")}


def commands():
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for name, value in re.findall(r'^([A-Z]+)="(.+)"$', text, flags=re.M):
            text = text.replace(f'{name}="{value}"', "").replace(f"${name}", value)
        for name, value in SHELL.items():
            text = text.replace(name, value)
        for line in COMMAND.findall(text):
            if "--" in line:
                yield pytest.param(line.strip(), id=f"{page.stem}: {line.strip()[:50]}")


@functools.cache
def help_of(command):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        main([command, "--help"])
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_a_page_is_short_and_its_links_lead_somewhere(page):
    text = page.read_text()
    assert len(text.splitlines()) <= 200
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            file, _, anchor = target.partition("#")
            found = (page.parent / file) if file else page
            assert found.exists(), target
            assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page):
    for path in re.findall(r"\b(?:rl_soft|rewards|tests|recipes|benchmarks)/[\w./-]*\w\.\w+\b", page.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("line", commands())
def test_a_command_has_keys_that_exist(line):
    first, *rest = shlex.split(line, comments=True)
    given = [re.sub(r"^--", "", word) for word in rest if word.startswith("--")]
    if first in ("train", "check") and rest[0] != "eval":
        first, *rest = rest
    if first.endswith(".yaml"):
        pairs = zip(rest, [*rest[1:], "--"], strict=True)
        words = [w.rstrip(";") for k, v in pairs if k.startswith("--") and k[2:] not in LAUNCH for w in (k, v)]
        load_recipe(ROOT / first, parse_overrides([w for w in words if w != "--"]))
    elif first.isalpha() and first.islower():
        known = help_of(rest[0] if first == "check" else first)
        for key in given:
            assert key in LAUNCH or f"--{key}" in known, key
