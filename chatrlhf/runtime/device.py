"""Where models live and in which precision their products are computed."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device() -> torch.device:
    """The accelerator of this machine, or the CPU. On a GPU attention is without cuDNN from then on."""
    if torch.cuda.is_available():
        # PyTorch prefers cuDNN's attention on Hopper from 2.11 on. Behind a mask its backward gives NaN for some
        # lengths (pytorch issue 196678), and each new shape costs it a plan: 18 ms on an H200 where flash needs 0.07.
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", torch.cuda.current_device())
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` as fp32 or bf16, for the stages that train with autocast: bf16 on a GPU that has it."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def resolve_rl_precision(precision: str, device: torch.device) -> str:
    """``auto`` for the RL stage, whose working copy is worth it on a CPU with bfloat16 products, too."""
    if precision == "auto" and device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return resolve_precision(precision, device)


def release_cached(device: torch.device) -> None:
    """Give memory back to the device that nothing uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
