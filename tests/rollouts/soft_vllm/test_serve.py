"""`rl-soft serve`, and the commands that have their rollouts from it or from vLLM in their own process.

./launch.sh test --vllm tests/rollouts/soft_vllm/test_serve.py
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from soft_models import EOS, EXPLICIT, LATENT, Job, assert_same, build

from rl_soft.cli import analyze as analyze_command
from rl_soft.cli import eval as eval_command
from rl_soft.cli import generate as generate_command
from rl_soft.evaluation import records
from rl_soft.rollouts.vllm.server import Server

ROOT = Path(__file__).parents[3]
PROBLEMS = {
    "dataset": "chain_sum",
    "dataset_options": {"min_terms": 2, "max_terms": 2, "compact": True},
    "eval_problems": 3,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The policy, and its folder."""
    return build("llama", tmp_path_factory.mktemp("served") / "llama")


@pytest.fixture(scope="module")
def url(model, tmp_path_factory):
    """Of a server, started as a user starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "96", "--dtype", "float32"]
    words += ["--max-num-seqs", "32", "--slots", "4", "--thoughts", "12", "--block-size", "32"]
    log = tmp_path_factory.mktemp("log") / "serve.log"
    command = [sys.executable, "-m", "rl_soft", "serve", str(model[1]), *words]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, env=dict(os.environ))
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def ask(url, **body):
    request = urllib.request.Request(
        url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)["choices"][0]


def test_soft_and_plain_requests_at_once(model, url):
    made, _ = model
    plain = {"prompt": [5, 6, 7], "max_tokens": 8, "temperature": 0, "logprobs": 2}
    alone = ask(url, **plain)
    server = Server(url + "/v1")
    kinds = [(LATENT, "gumbel"), (EXPLICIT, "gumbel"), (EXPLICIT, "dirichlet"), (LATENT, "token"), (LATENT, "soft")]
    jobs = [Job(made, replace(base, thought=kind), samples=2) for base, kind in kinds]
    with ThreadPoolExecutor(8) as threads:
        soft = [threads.submit(server.rollout, job.layout, job.prompts, job.seeds, EOS) for job in jobs]
        beside = [threads.submit(ask, url, **plain) for _ in range(3)]
        for job, theirs in zip(jobs, soft, strict=True):
            assert_same(theirs.result(), job.ours())
        for answer in beside:
            assert answer.result()["text"] == alone["text"]
            numbers = [choice["logprobs"]["token_logprobs"] for choice in (answer.result(), alone)]
            assert torch.tensor(numbers[0]).sub(torch.tensor(numbers[1])).abs().max() < 1e-4


def test_a_soft_request_of_the_openai_api(model, url):
    """Without logprobs there is text: here, the forced answer prompt and the answer."""
    made, _ = model
    job = Job(made, LATENT, samples=1, questions=["1+1=?"])
    out = job.ours()
    xargs = {"thought": "gumbel", "thought_k": 4, "num_thoughts": 4, "answer_prompt": "=", "max_answer_tokens": 5}
    answer = ask(url, prompt=job.prompts[0], max_tokens=40, vllm_xargs={**xargs, "seed": job.seeds.tolist()[0]})
    expected = made.tokenizer.decode(out.completion_ids[0][out.mask[0]], skip_special_tokens=True)
    assert expected.startswith("=") and answer["text"] == expected
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(url, prompt=[5], vllm_xargs={"thought": "gumbel", "thougt_k": 3})
    assert refused.value.code == 400 and "did you mean thought_k" in refused.value.read().decode()


def test_records_do_not_depend_on_the_engine(model, url, tmp_path):
    values = {**PROBLEMS, "eval_samples": 2}
    for name, engine in (("ours", {}), ("theirs", {"server": url})):
        eval_command.run(str(model[1]), values | engine | {"output_dir": str(tmp_path / name)})
    ours, theirs = (records.read(tmp_path / name / "records.jsonl") for name in ("ours", "theirs"))
    assert len(ours) == 9
    for mine, other in zip(ours, theirs, strict=True):
        assert {**mine, "thought_tokens": 0} == {**other, "thought_tokens": 0}
    # Another engine is another evaluation; where the server is makes none.
    with pytest.raises(ValueError, match="engine = 'vllm', this one has None"):
        eval_command.run(str(model[1]), values | {"output_dir": str(tmp_path / "theirs")})
    again = {"server": url.replace("127.0.0.1", "localhost"), "output_dir": str(tmp_path / "theirs")}
    eval_command.run(str(model[1]), values | again)


def test_generate_and_traces_by_a_server(model, url, tmp_path):
    for name, engine in (("ours", {}), ("theirs", {"server": url})):
        values = {"prompt": "1+1=?", "samples": 3, "output": str(tmp_path / f"{name}.jsonl")}
        generate_command.run(str(model[1]), values | engine)
        values = {**PROBLEMS, "eval_samples": 1, "output_dir": str(tmp_path / name)}
        analyze_command.run("traces", str(model[1]), values | engine)
    completions = [
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("ours", "theirs")
    ]
    assert [c["ids"] for c in completions[0]] == [c["ids"] for c in completions[1]]
    assert [c["thinking_end"] for c in completions[0]] == [c["thinking_end"] for c in completions[1]]
    traces = [(tmp_path / name / "traces.jsonl").read_text().splitlines()[1:] for name in ("ours", "theirs")]
    for mine, other in zip(*traces, strict=True):
        for kind in ("greedy", "soft", "gumbel", "dirichlet", "sampled"):
            assert [t["ids"] for t in json.loads(mine)[kind]] == [t["ids"] for t in json.loads(other)[kind]]
    with pytest.raises(ValueError, match="analyze lens reads the model's own states; it needs engine ours"):
        analyze_command.run("lens", str(model[1]), values | {"server": url})


def test_vllm_in_this_process(model, tmp_path):
    """As a user runs it; the same ids as ours."""
    values = {"prompt": "1+1=?", "samples": 2, "output": str(tmp_path / "ours.jsonl")}
    generate_command.run(str(model[1]), values)
    command = [sys.executable, "-m", "rl_soft", "generate", str(model[1]), "--prompt", "1+1=?", "--samples", "2"]
    run = subprocess.run(
        [*command, "--engine", "vllm", "--json"], capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr[-3000:]
    theirs = [json.loads(line) for line in run.stdout.splitlines()]  # JSON and nothing else
    ours = [json.loads(line) for line in (tmp_path / "ours.jsonl").read_text().splitlines()]
    assert [c["ids"] for c in theirs] == [c["ids"] for c in ours]
    assert theirs[0]["settings"]["engine"] == "vllm"


@pytest.mark.parametrize("changes, words", [
    ({"thought_k": 5}, "thought_k 5 is above the 4 slots of server"),
    ({"num_thoughts": 13}, "num_thoughts 13 is above the 12 of server"),
    ({"max_answer_tokens": 95}, "max_model_len of server .* is 96"),
    ({"dtype": "bfloat16"}, "dtype is bfloat16, and server .* has float32"),
    ({"control": "zero"}, "control zero is not available with engine vllm; use engine ours"),
])  # fmt: skip
def test_what_a_server_was_not_made_for(model, url, tmp_path, changes, words):
    values = {**PROBLEMS, "eval_samples": 1, "server": url, "output_dir": str(tmp_path / "out"), **changes}
    with pytest.raises(ValueError, match=words):
        eval_command.run(str(model[1]), values)
    assert not (tmp_path / "out").exists()


def test_another_model(url, tmp_path):
    server = Server(url)
    for name, spread, words in (("qwen2", 2.0, "its architectures is"), ("llama", 1.5, "its weights are not those")):
        _, folder = build(name, tmp_path / f"{name}{spread}", spread)
        with pytest.raises(ValueError, match=f"serves another model, .*{words}"):
            server.check_model(str(folder), "float32")


class Other(BaseHTTPRequestHandler):
    """A server of something else."""

    body = b""

    def do_GET(self):
        self.send_response(200 if self.body else 404)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("body, why", [(b"", "with 404"), (b"<html>", "does not say"), (b'{"object": 1}', "does not")])
def test_a_server_without_the_plugin(body, why):
    other = HTTPServer(("127.0.0.1", 0), type("Another", (Other,), {"body": body}))
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ValueError, match=f"serves no soft rows .*{why}"):
            Server(f"http://127.0.0.1:{other.server_port}")
    finally:
        other.shutdown()


def test_a_server_that_is_not_there(model, tmp_path):
    values = {**PROBLEMS, "eval_samples": 1, "server": "http://127.0.0.1:9", "output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match=r"server http://127.0.0.1:9 cannot be reached: .*; start one with rl-soft"):
        eval_command.run(str(model[1]), values)
    with pytest.raises(ValueError, match="server must be http://HOST:PORT, got 'localhost:8000'"):
        Server("localhost:8000")


def test_entries_of_a_record_are_not_spelled():
    """Their ids are above the vocabulary, where tokenizers of some kinds fail."""
    from vllm import SamplingParams

    from rl_soft.rollouts.vllm.admission import Admission

    soft = {"extra_args": {"thought": "gumbel"}}
    for arguments, spelled in (({**soft, "logprobs": 5}, False), (soft, True), ({"logprobs": 5}, True)):
        params = SamplingParams(**arguments)
        Admission.validate_params(params)
        assert params.detokenize == spelled


def test_an_architecture_that_vllm_does_not_know(model, tmp_path):
    from rl_soft.rollouts.vllm.serve import command

    folder = tmp_path / "other"
    folder.mkdir()
    for file in model[1].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["LamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architecture LamaForCausalLM, which this vLLM does not know"):
        command(str(folder), [])
    made = command(str(model[1]), ["--additional-config", '{"a": 1}', "--port", "1", "--max-logprobs=-1"], 4, 12)
    assert json.loads(made[made.index("--additional-config") + 1]) == {"a": 1, "soft": {"slots": 4, "thoughts": 12}}
    assert made[made.index("--max-logprobs") + 1] == "-1" and made[-2:] == ["--port", "1"]
