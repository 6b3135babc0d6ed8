"""`rl-soft export`: a model as plain transformers, vLLM and lm-eval load it, with a model card."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import yaml

from rl_soft.config.arguments import DTYPES
from rl_soft.evaluation.card import merged_card, model_card
from rl_soft.keys import nearest
from rl_soft.model.folder import base_of, is_adapter, model_folder

logger = logging.getLogger("rl_soft")


def check_dtype(dtype: str | None) -> None:
    """Raises ValueError for a name that is no dtype of weights."""
    if dtype not in (None, *DTYPES):
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}{nearest(dtype, DTYPES)}")


def run(source: str, folder: Path, dtype: str | None = None) -> None:
    """Write the model of `source` into the new `folder`.

    Raises:
        ValueError: what `model_folder`, `new_folder` and `export` refuse, or an unknown dtype.
    """
    check_dtype(dtype)
    path = Path(model_folder(source))
    if folder.exists():
        raise ValueError(f"{folder} exists; nothing is overwritten: name a new folder for --merged")
    from rl_soft.model.export import export

    thinking = export(source, folder, dtype, card_of(path, folder))
    if thinking is None:
        logger.info("it was not trained by rl-soft, so the folder says nothing of how it thinks")
    logger.info("model: %s", folder)


def card_of(path: Path, folder: Path) -> str:
    """The README.md of what is exported from the model folder or checkpoint at `path`."""
    recipe, report = path.parent / "config.yaml", path.parent / "report.json"
    if not recipe.exists():
        return merged_card(folder, str(path), base_of(path) if is_adapter(path) else None)
    figures = json.loads(report.read_text()) if path.name == "model" and report.exists() else None
    return model_card(folder, yaml.safe_load(recipe.read_text()), figures, merged=True)
