"""What there is to compute on, and how it is set up: once, for training, evaluation and every command."""

from __future__ import annotations

import os
import shutil
import subprocess

import torch


def device() -> str:
    """`cuda` or `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def has_bfloat16() -> bool:
    """Whether there is a GPU that computes in bfloat16; older ones only emulate it, slowly."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def default_dtype() -> str:
    """dtype of weights that are read and not trained."""
    return "bfloat16" if has_bfloat16() else "float32"


def set_up() -> None:
    """Before a model is loaded.

    Raises:
        ValueError: this machine has GPUs that torch does not see.
    """
    check_gpus()
    avoid_cudnn_attention()


def avoid_cudnn_attention() -> None:
    """Switch cuDNN's attention off, which torch prefers on Hopper since 2.11.

    Its backward returns NaN gradients where a mask is given, the length is 64 above a multiple of 128, and a row's
    logsumexp is below -88.7 (pytorch/pytorch#196678, huggingface/trl#7181). Training batches are padded, so they
    always have a mask. Torch then takes its memory-efficient attention, which is right there.
    """
    if torch.cuda.is_available():
        torch.backends.cuda.enable_cudnn_sdp(False)


def has_cudnn_attention() -> bool:
    """Whether attention on this machine's GPU may be cuDNN's."""
    return torch.cuda.is_available() and torch.backends.cuda.cudnn_sdp_enabled()


def check_gpus() -> None:
    """Raises ValueError where nvidia-smi shows GPUs and torch sees none: everything would run on the CPU, slowly.

    A machine that is to run on its CPU hides its GPUs: CUDA_VISIBLE_DEVICES is set to nothing, or to -1.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1")
    if hidden or torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return
    shown = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    drivers = shown.stdout.split() if shown.returncode == 0 else []
    if not drivers:
        return
    cuda = torch.version.cuda
    if cuda is None:
        advice = f"torch {torch.__version__} is built without CUDA; install its build for CUDA"
    else:
        advice = (
            f"torch {torch.__version__} needs a driver for CUDA {cuda}, and this is {drivers[0]}; update the driver, "
            f"or install a build of torch for an older CUDA (nvidia-smi shows the driver's)"
        )
    raise ValueError(
        f"nvidia-smi shows {len(drivers)} GPU(s) and torch sees none: {advice}. To run on the CPU all the same, set "
        'CUDA_VISIBLE_DEVICES=""'
    )
