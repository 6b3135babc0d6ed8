"""`push_to_hub` against a stand-in of the hub's HTTP API: what is sent, when, and what is not.

pytest tests/train/test_hub.py
"""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from huggingface_hub import constants
from test_resume import RL, warm_start  # noqa: F401 (a fixture)

from rl_soft.config.recipe import load_recipe
from rl_soft.train import pipeline as train
from rl_soft.train.runtime.hub import Hub


class StandIn(ThreadingHTTPServer):
    """Takes repositories and commits; `refuses` is a path that it answers with an error."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.made, self.commits, self.branches, self.refuses = [], [], [], None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if self.refuses and self.refuses in path:
            return 403, {"error": "no right to write"}
        if path == "/api/repos/create":
            self.made.append(json.loads(body))
            name = f"{self.made[-1].get('organization') or 'me'}/{self.made[-1]['name']}"
            return 200, {"url": f"{self.url}/{name}", "name": name}
        if "/branch/" in path:
            self.branches.append(path.rpartition("/")[2])
        if "/preupload/" in path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
        if "/commit/" in path:
            header, *files = map(json.loads, body.decode().splitlines())
            content = {file["value"]["path"]: base64.b64decode(file["value"]["content"]) for file in files}
            self.commits.append((path.partition("/api/models/")[2], header["value"]["summary"], content))
            return 200, {"commitUrl": f"{self.url}/me/run/commit/0", "commitOid": "0"}
        return 200, {}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, answer = self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def hub(monkeypatch):
    server = StandIn()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def recipe(folder, warm_start, **values):  # noqa: F811
    path = folder / "rl.yaml"
    given = {
        **RL,
        "output_dir": str(folder / "run"),
        "warm_start": str(warm_start),
        "max_steps": 4,
        "eval_problems": 0,
    }
    path.write_text(yaml.safe_dump(given | values))
    return load_recipe(path)


def test_the_model_is_sent_at_checkpoints_and_at_the_end(hub, tmp_path, warm_start):  # noqa: F811
    asked = {"push_to_hub": True, "hub_model_id": "us/mine", "hub_private_repo": True, "hub_revision": "v1"}
    run = train.run(recipe(tmp_path, warm_start, **asked))
    assert hub.made == [{"name": "mine", "organization": "us", "visibility": "private"}] and hub.branches == ["v1"]
    assert [said for _, said, _ in hub.commits] == ["step 2", "step 4", "end of training"]
    assert {place for place, *_ in hub.commits} == {"us/mine/commit/v1"}
    model = {file.name: file.read_bytes() for file in (run / "model").iterdir()}
    assert hub.commits[-1][2] == model and {"README.md", "rl_soft.json", "model.safetensors"} <= model.keys()
    assert hub.commits[1][2]["model.safetensors"] == model["model.safetensors"]
    for _, _, files in hub.commits:
        assert not [name for name in files if name.endswith((".pt", ".bin", ".pth", ".jsonl"))], (
            "neither pickle nor records"
        )
    assert not (run / "model.safetensors").exists(), "the run's folder stays as it is"


@pytest.mark.parametrize("asked", [{}, {"hub_model_id": "us/mine"}, {"push_to_hub": False, "hub_strategy": "end"}])
def test_nothing_is_sent_unasked(hub, tmp_path, warm_start, asked):  # noqa: F811
    train.run(recipe(tmp_path, warm_start, **asked, max_steps=2))
    assert hub.made == hub.commits == []


def test_a_hub_that_refuses_is_told_before_anything_is_trained(hub, tmp_path, warm_start):  # noqa: F811
    hub.refuses = "/api/repos/create"
    made = recipe(tmp_path, warm_start, push_to_hub=True)
    with pytest.raises(ValueError, match=r"push_to_hub: run cannot be opened: .*; log in \(hf auth login\)"):
        train.run(made)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_outlives_a_hub_that_fails_and_sends_later(hub, tmp_path, warm_start, caplog):  # noqa: F811
    hub.refuses = "/commit/"
    made = recipe(tmp_path, warm_start, push_to_hub=True, max_steps=2)
    with pytest.raises(ValueError, match=r"push_to_hub: .*the same command sends it"):
        train.run(made)
    assert "checkpoint-2 was not sent" in caplog.text and (tmp_path / "run/model").is_dir()
    hub.refuses = None
    train.run(made)
    assert [said for _, said, _ in hub.commits] == ["end of training"]


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("end", []),
        ("every_save", [""]),
        ("checkpoint", ["", "last-checkpoint/"]),
        ("all_checkpoints", ["", "checkpoint-2/"]),
    ],
)
def test_what_is_sent_at_a_checkpoint(hub, tmp_path, strategy, places):
    class State:
        is_world_process_zero, global_step = True, 2

    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    for name in ("model.safetensors", "config.json", "optimizer.pt", "training_args.bin", "trainer_state.json"):
        (folder / name).write_text("{}")
    Hub({"hub_strategy": strategy, "hub_model_id": "us/mine"}, tmp_path).on_save(None, State, None)
    model = ("config.json", "model.safetensors")
    whole = (*model, "optimizer.pt", "trainer_state.json")
    assert [set(files) for _, _, files in hub.commits] == [
        {f"{place}{name}" for name in (whole if place else model)} for place in places
    ]
