"""What stands at the path of a model: a folder of ours, a run, an adapter, or something that cannot be loaded.

Files alone are looked at, and torch is not needed, so that a mistake is told at once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rl_soft.files import write_atomic
from rl_soft.thoughts.thinking import Thinking

SIDE_FILE = "rl_soft.json"
ADAPTER = "adapter_config.json"
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "vocab-*", "*.tiktoken", "*.vocab")  # one of them is needed
FROM_GGUF = (
    "AutoModelForCausalLM.from_pretrained({folder!r}, gguf_file={name!r}).save_pretrained(OUT), and the same with "
    "AutoTokenizer"
)


def model_folder(name: str) -> str:
    """The name of a model, of which a run's folder means the model in it.

    Args:
        name: a folder, or what may be a hub id.

    Raises:
        ValueError: a path that does not exist, a file, a folder without a model or with a cut one, an adapter without
            its base; with what to do about it.
    """
    path = Path(name)
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~", "models/", "runs/")) or name.count("/") > 1:
            hint = "; run `rl-soft fetch smollm2` first" if "smollm2" in name else ""
            raise ValueError(f"model folder {name} does not exist{hint}")
        return name
    if path.suffix == ".gguf" or (path.is_dir() and not has_model(path) and next(path.glob("*.gguf"), None)):
        file = path if path.suffix == ".gguf" else next(path.glob("*.gguf"))
        made = FROM_GGUF.format(folder=str(file.parent), name=file.name)
        raise ValueError(f"model {name} is a GGUF file, and weights are trained as a plain folder: {made}")
    if not path.is_dir():
        raise ValueError(f"model {name} is a file; name the folder of a model")
    if (path / "config.yaml").exists() and not has_model(path):
        if not (path / "model").exists():
            raise ValueError(f"run {name} has no model yet; the command that started it goes on with it")
        path = path / "model"
    if not has_model(path):
        inside = sorted(folder.parent for folder in [*path.glob("*/config.json"), *path.glob(f"*/{ADAPTER}")])
        hint = f"; one is in {inside[-1]}" if inside else ""
        raise ValueError(f"folder {name} holds no model: it has neither config.json nor {ADAPTER}{hint}")
    if is_adapter(path):
        base_of(path)
    elif not has_tokenizer(path):
        raise ValueError(
            f"model {path} has no tokenizer (tokenizer.json, or another vocabulary); put its origin's beside it: "
            f"AutoTokenizer.from_pretrained(ORIGIN).save_pretrained({str(path)!r})"
        )
    return str(path)


def check_revision(name: str, revision: str | None) -> None:
    """Raises ValueError for a revision of a folder, which has one version of its model."""
    if revision not in (None, "main") and Path(name).exists():
        raise ValueError(f"model_revision {revision!r} is for a hub id, and {name} is a folder; leave it out")


def has_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or is_adapter(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a vocabulary; tokenizer_config.json alone is none."""
    return any(next(folder.glob(pattern), None) for pattern in VOCABULARIES)


def read_thinking(path: Path) -> Thinking | None:
    """The `Thinking` that a folder was trained for; None when it is not one of ours."""
    file = path / SIDE_FILE
    return Thinking.from_dict(json.loads(file.read_text())["thinking"]) if file.exists() else None


def write_thinking(folder: Path, thinking: Thinking, also: dict[str, Any] | None = None) -> None:
    """`also`: what else rl_soft.json says, by key."""
    side = json.dumps({"format": 1, "thinking": thinking.to_dict(), **(also or {})}, indent=2) + "\n"
    write_atomic(folder / SIDE_FILE, side)


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER).exists()


def base_of(folder: Path) -> str:
    """The base of an adapter: a folder, from here or from the adapter's folder, or else a hub id.

    Raises:
        ValueError: the adapter names no base, or a folder that is in neither place.
    """
    try:
        name = json.loads((folder / ADAPTER).read_text()).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / ADAPTER} cannot be read: {error}") from None
    if not name:
        raise ValueError(f"adapter {folder} names no base; set base_model_name_or_path in its {ADAPTER}")
    if Path(name).exists():
        return str(name)
    if (folder / name).exists():
        return str((folder / name).resolve())
    if Path(name).is_absolute() or name.startswith((".", "models/", "runs/")) or name.count("/") > 1:
        raise ValueError(
            f"adapter {folder}: its base {name} does not exist, neither from here nor from the adapter's folder; "
            f"set base_model_name_or_path in its {ADAPTER}"
        )
    return str(name)
