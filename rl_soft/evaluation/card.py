"""The README.md of a trained model: what it is, how it was made, how to load it and think with it, its figures."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rl_soft.evaluation.render import code, markdown_table, method, provenance, table

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


MERGED = (
    "This folder holds whole weights, with any adapter merged into them: plain transformers, vLLM and lm-eval load "
    "it. Loaded so, it writes words, not soft tokens."
)


def merged_card(folder: Path, source: str, base: str | None) -> str:
    """The page of a merged model that no run of this package is known of.

    Args:
        source: what was merged; base: the model under its adapter, None for whole weights.
    """
    front = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base and HUB_ID.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    origin = f"Made by `rl-soft export` from {code(source)}" + (f", an adapter of {code(base)}." if base else ".")
    return "\n".join([*lines, f"# {folder.name}", "", origin, "", MERGED]) + "\n"


def model_card(
    folder: str | Path, config: Mapping[str, Any], report: Mapping[str, Any] | None = None, merged: bool = False
) -> str:
    """YAML front matter for the hub, and a page.

    Args:
        folder: where the model is; the name of its run is the model's.
        config: the resolved recipe, flat.
        report: what `build` or `compare` returned, its last evaluation being the model's; None without an evaluation.
        merged: the folder holds whole weights, whatever was trained.
    """
    path = Path(folder)
    name = (path.parent if path.name == "model" else path).resolve().name
    base = config.get("model_name_or_path")
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in _front(name, config, report, merged).items()),
        "---",
        "",
    ]
    lines += [f"# {name}", "", f"{_origin(config)} {_thinking(config)}", ""]
    lines += ["## Load it and think with it", "", "```python", *_snippet(path, config), "```", ""]
    lines += [f"Or in a terminal: `rl-soft generate {path} --prompt 'TEXT'`.", ""]
    if merged:
        lines += [MERGED, ""]
    elif config.get("use_peft"):
        lines += [
            f"This folder holds a LoRA adapter of rank {config.get('lora_r')} for {code(str(base))}. Plain PEFT loads "
            "it too: `PeftModel.from_pretrained(BASE_MODEL, FOLDER)`. Loaded so, it writes words, not soft tokens.",
            "",
        ]
    if report:
        lines += [f"## Results: {report['title']}", ""]
        lines += [f"**Partial records.** {'; '.join(report['partial'])}.", ""] if report["partial"] else []
        lines += [*(f"{provenance(summary)}  " for summary in report["evaluations"]), ""]
        lines += [*markdown_table(table(report)), "", method(report)]
        lines += ["", "### Warnings", "", *(f"- {note}" for note in report["warnings"])] if report["warnings"] else []
    else:
        lines += [
            "## Results",
            "",
            f"The run made no evaluation: `rl-soft eval {path} --dataset NAME --output_dir DIR`.",
        ]
    shown = {key: value for key, value in config.items() if value not in (None, "", {}, [])}
    settings = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in shown.items())
    return "\n".join([*lines, "", "## Configuration", "", f"```yaml\n{settings}\n```"]) + "\n"


def _front(
    name: str, config: Mapping[str, Any], report: Mapping[str, Any] | None, merged: bool = False
) -> dict[str, Any]:
    tags = ["rl-soft", "soft-thinking", str(config["method"]), str(config["thought"])]
    adapter = config.get("use_peft") and not merged
    front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers", "tags": tags}
    front["pipeline_tag"] = "text-generation"
    base = str(config.get("model_name_or_path") or "")
    if HUB_ID.fullmatch(base) and not Path(base).exists():
        front["base_model"] = base
    if report:
        last = report["evaluations"][-1]
        metrics = [{"type": "pass@k", "name": f"pass@{row['k']}", "value": row["mean"]} for row in last["pass_at_k"]]
        if last["greedy"]:
            metrics.insert(0, {"type": "accuracy", "name": "greedy", "value": last["greedy"]["mean"]})
        header = last["header"]
        dataset = {"name": header["dataset"], "type": header["dataset"], "split": header["split"]}
        results = [{"task": {"type": "text-generation"}, "dataset": dataset, "metrics": metrics}]
        front["model-index"] = [{"name": name, "results": results}]
    return front


def _origin(config: Mapping[str, Any]) -> str:
    """One sentence: by which method, from what, on which data."""
    if config.get("model_name_or_path"):
        start = f"the model {code(str(config['model_name_or_path']))}"
    elif config.get("warm_start"):
        start = f"the result of the recipe {code(str(config['warm_start']))}"
    else:
        start = f"random weights of the type {code(str((config.get('model_config') or {}).get('model_type')))}"
    rows = f"{config['train_size']} rows of " if config.get("train_size") else ""
    data = f"{rows}{code(str(config['dataset']))}"
    return f"Trained by rl_soft with the method `{config['method']}`, from {start}, on {data}."


def _thinking(config: Mapping[str, Any]) -> str:
    """One sentence: what the model does before it answers."""
    kind, n = config["thought"], config["num_thoughts"]
    if config["phase"] == "latent":
        return f"It thinks in {n} thoughts of the kind `{kind}` between `<bot>` and `<eot>`, then answers."
    end = code(str(config["end_of_thinking"]))
    return f"It thinks in thoughts of the kind `{kind}` until it has said {end}, in at most {n}, then answers."


def _snippet(folder: Path, config: Mapping[str, Any]) -> list[str]:
    return [
        "from rl_soft import generate, load_policy",
        "",
        f"policy = load_policy({str(folder)!r})  # or where the folder is now, or its hub id",
        "(completions,) = generate(policy.model, policy.tokenizer, ['QUESTION'], thinking=policy.thinking)",
        "print(completions[0].answer)",
    ]
