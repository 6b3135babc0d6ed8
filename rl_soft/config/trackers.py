"""The trackers of `report_to`: those that the installed transformers knows, each with the packages that it needs."""

from __future__ import annotations

import ast
import functools
import importlib.util
import os
from pathlib import Path

from rl_soft.keys import nearest

# tracker -> what is imported and what is installed, where they are not called as it is
PACKAGES = {
    "azure_ml": {"azureml": "azureml-core"},
    "dagshub": {"dagshub": "dagshub", "mlflow": "mlflow"},
    "flyte": {"flytekit": "flytekit"},
    "tensorboard": {"tensorboard": "tensorboard", "tensorboardX": "tensorboardX"},  # one of the two
}
KUBEFLOW = "KUBEFLOW_TRAINER_SERVER_URL"  # it needs no package; Kubeflow's trainer sets this


@functools.cache
def trackers() -> tuple[str, ...]:
    """The names in transformers' table of callbacks, read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        raise ValueError("transformers is not installed")
    file = Path(found.origin).parent / "integrations/integration_utils.py"
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INTEGRATION_TO_CALLBACK":
            return tuple(sorted(ast.literal_eval(key) for key in node.value.keys if key))  # type: ignore[attr-defined]
    raise ValueError(f"{file} holds no table of trackers")


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raises ValueError for a tracker that is unknown or not installed, before anything is trained."""
    if not isinstance(report_to, str | list | None):
        raise ValueError(f"report_to must be a text or a list of texts, got {report_to!r}")
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in ("none", "all"):
            continue
        if name not in trackers():
            raise ValueError(
                f"report_to must be none, all or of {', '.join(trackers())}, got {name!r}{nearest(name, trackers())}"
            )
        if name == "kubeflow":
            if KUBEFLOW not in os.environ:
                raise ValueError(f"report_to: kubeflow needs the environment variable {KUBEFLOW}")
            continue
        packages = PACKAGES.get(name, {name: name})
        missing = [installed for imported, installed in packages.items() if importlib.util.find_spec(imported) is None]
        if missing and (name != "tensorboard" or len(missing) == len(packages)):
            raise ValueError(f"report_to: {name} is not installed; pip install {missing[0]}")
