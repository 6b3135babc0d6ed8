"""What a server says of itself to those who want soft rollouts of it, at the route `ROUTE`.

vLLM puts the class `About` around its own routes (option --middleware). Others learn from it, before they ask for
anything, which model is served, with how many slots and thoughts, and how long a row may become.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rl_soft.rollouts.vllm.options import limits

ROUTE = "/rl_soft"
PASSING = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")  # they make no other model
PLACES, BYTES = 16, 4096  # of each file of weights, that are looked at


class About:
    """An ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.identity: dict[str, Any] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if "app" in scope and self.identity is None:  # as the server starts: files may be written over later
            self.identity = identity(scope["app"].state.vllm_config.model_config.model)
        if scope["type"] != "http" or scope["path"] != ROUTE:
            return await self.app(scope, receive, send)
        body = json.dumps(about(scope["app"].state.vllm_config) | (self.identity or {})).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def about(vllm_config: Any) -> dict[str, Any]:
    """Name -> value, as JSON can hold them."""
    model = vllm_config.model_config
    slots, thoughts = limits(vllm_config.additional_config)
    return {
        "model": model.model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": model.get_vocab_size(),
        "max_model_len": model.max_model_len,
        "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
        "slots": slots,
        "thoughts": thoughts,
    }


def identity(model: str) -> dict[str, Any]:
    """By what a model is known on two machines, whatever its folder is called there.

    Args:
        model: a folder, or a hub id that is in the cache.

    Returns:
        `config`: of config.json, what makes a model. `weights`: a hash of places in its safetensors files; None where
        there are none here.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model)
    if not folder.is_dir():
        file = try_to_load_from_cache(model, "config.json")
        if not isinstance(file, str):
            return {"config": {}, "weights": None}
        folder = Path(file).parent
    config = {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in PASSING}
    files, digest = sorted(folder.glob("*.safetensors")), hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as opened:
            for i in range(PLACES):
                opened.seek(max(0, size - BYTES) * i // (PLACES - 1))
                digest.update(opened.read(BYTES))
    return {"config": config, "weights": digest.hexdigest() if files else None}
