"""A machine whose GPUs torch does not see; attention that is not right on some GPUs.

pytest tests/model/test_devices.py
"""

import pytest
import torch

from rl_soft.model import devices
from rl_soft.train.runtime.processes import prepare_devices


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """An nvidia-smi that prints what it is told to."""

    def says(lines, code=0):
        command = tmp_path / "nvidia-smi"
        command.write_text(f"#!/bin/sh\nprintf '{lines}'\nexit {code}\n")
        command.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return says


@pytest.mark.parametrize(
    ("cuda", "advice"), [("13.0", "needs a driver for CUDA 13.0, and this is 535.104.05"), (None, "without CUDA")]
)
def test_gpus_that_torch_does_not_see_are_one_line(smi, monkeypatch, cuda, advice):
    smi(r"535.104.05\n535.104.05\n")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ValueError, match=rf"^nvidia-smi shows 2 GPU\(s\) and torch sees none: .*{advice}") as error:
        prepare_devices()
    assert "\n" not in str(error.value) and 'CUDA_VISIBLE_DEVICES=""' in str(error.value)


def test_a_machine_without_gpus_is_left_alone(smi, monkeypatch):
    devices.check_gpus()  # no nvidia-smi
    smi("NVIDIA-SMI has failed", 9)
    devices.check_gpus()
    smi("535.104.05")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        devices.check_gpus()


def test_cudnn_s_attention_is_off_on_a_gpu(monkeypatch):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        assert devices.has_cudnn_attention()
        devices.set_up()
        assert not devices.has_cudnn_attention()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()  # what torch takes then
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
