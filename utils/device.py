"""Which device computes, and in which precision."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError


def choose_device(gpu: str, say: Any) -> torch.device:
    """Return the device that `--gpu` asks for: a CUDA number, or `cpu`.

    Without a CUDA device every number means the CPU, and one line says so.
    """
    if gpu.strip().lower() == "cpu":
        return torch.device("cpu")
    if not (gpu.isascii() and gpu.strip().isdigit()):
        raise UserError(f"--gpu {gpu}: no device number: give one number, e.g. --gpu 0, or --gpu cpu")
    if not torch.cuda.is_available():
        say("no CUDA device here: running on the CPU (--gpu cpu asks for it)")
        return torch.device("cpu")
    if int(gpu) >= torch.cuda.device_count():
        raise UserError(
            f"--gpu {gpu}: there are {torch.cuda.device_count()} CUDA devices: give 0 to {torch.cuda.device_count() - 1}"
        )
    torch.cuda.set_device(int(gpu))
    return torch.device("cuda", int(gpu))


def set_determinism(deterministic: bool, benchmark: bool) -> None:
    """Set cuDNN and torch as `seed.deterministic` and `seed.benchmark` say."""
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark and not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


@dataclass(frozen=True)
class Precision:
    """fp32, or bf16 autocast for the convolutions with the channels last in memory (`--amp`)."""

    device: torch.device
    amp: bool

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Return the context of one forward pass.

        The cache of cast weights is off: a forward without gradient would fill it with weights that a later forward
        with gradient then uses, and their gradients vanish without a word (pytorch issue 65766).
        """
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def lay_out(self, images: Tensor) -> Tensor:
        """Return the images with the channels last in memory where that is faster."""
        return images.contiguous(memory_format=torch.channels_last) if self.amp else images


def choose_precision(device: torch.device, amp: bool, say: Any) -> Precision:
    """Return the precision; `--amp` on a device without fast bf16 falls back to fp32, and one line says so."""
    if amp and not has_bf16(device):
        say("--amp: this device has no bf16 instructions: running in fp32")
        amp = False
    return Precision(device, amp)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device computes in bf16 (CUDA: Ampere or newer; CPU: AVX512_BF16, AMX or Arm's BF16)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and native_bf16())


def native_bf16() -> bool:
    """Return whether the processor's flags name bf16: oneDNN also emulates it, slowly, on AVX512 alone."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return True  # no such file (macOS, Windows): believe oneDNN
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))
