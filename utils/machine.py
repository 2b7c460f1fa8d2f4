"""Where the work is done: the device, its precision, and the other processes of the run."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError
from utils.processes import Place, find_place, launched, leftovers

logger = logging.getLogger(__name__)
SILENCE = timedelta(seconds=600)  # a process that is not heard of for so long ends the run
PATIENCE = timedelta(days=1)  # the first process may train an attacker's networks while the others wait

# Batches of training in one of scoring or testing on CUDA: 8 x 128 images of 32 x 32 are what keeps a large device busy. They
# take less memory than 128 in training, which keeps the outputs of all layers for the backward pass, so that a batch size
# at which training fits is small enough for scoring too.
INFERENCE = 8

# DistributedDataParallel's option to copy the first process' buffers to the others in every forward pass: torch 2.13 gave it
# a new name and warns of the old one.
NAMES = ("forward_sync_buffers", "broadcast_buffers")
BROADCAST = next(name for name in NAMES if name in inspect.signature(DistributedDataParallel).parameters)


@dataclass(frozen=True)
class Machine:
    """One process' place of work. With several processes (torchrun) each has one, and all of them do the same steps.

    Every batch is shared out: process r of n does rows r * count // n to (r + 1) * count // n. What is decided from all
    rows (the pools, the losses that are reported) is gathered first, so that every process decides the same.
    """

    device: torch.device
    amp: bool = False  # bf16 autocast
    rank: int = 0
    world_size: int = 1
    patient: Any = None  # the same processes as a group that waits longer than `SILENCE`

    def autocast(self, cast_once: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return the context of forward passes.

        Args:
            cast_once: cast each weight to bf16 once for all passes in the context. Only for passes without gradient: with
                it a backward pass would add up their gradients in bf16, and a weight that was cast without gradient gets
                none at all in a later pass (pytorch issue 65766).
        """
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cast_once)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and convolution weights.

        channels_last is 1.2 to 1.35 times as fast as the contiguous layout on a CPU, in fp32 too, and what the bf16
        kernels of a GPU want. In fp32 on a GPU nothing has been measured.
        """
        return torch.channels_last if self.amp or self.device.type == "cpu" else torch.contiguous_format

    def to_memory_format(self, images: Tensor) -> Tensor:
        """Return the images in the memory format of this device (`memory_format`)."""
        return images.contiguous(memory_format=self.memory_format)

    def shard(self, count: int) -> slice:
        """Return this process' part of `count` rows: all of them where there is one process."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def inference_batch(self, batch: int) -> int:
        """Return how many images a forward pass without gradients takes, where a training step takes `batch`.

        On CUDA `INFERENCE` times as many. A CPU gains nothing by larger batches. In eval mode no image depends on the
        others, so the results are the same up to rounding.
        """
        return INFERENCE * batch if self.device.type == "cuda" else batch

    def all_gather(self, rows: Tensor, count: int) -> Tensor:
        """Return all `count` rows (count, ...) of which every process has its share, in order.

        Gradients flow into this process' own rows; the others' are constants here.
        """
        if self.world_size == 1:
            return rows
        if rows.dtype == torch.bfloat16:
            rows = rows.float()
        sizes = [(r + 1) * count // self.world_size - r * count // self.world_size for r in range(self.world_size)]
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: rows.shape[0]] = rows.detach()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        parts = [part[:n] for part, n in zip(parts, sizes, strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def backward(self, loss: Tensor) -> None:
        """Add up the gradients of a mean over a batch that the processes share.

        DistributedDataParallel divides the sum of their gradients by their number, which is undone beforehand.
        """
        (loss * self.world_size).backward()  # type: ignore[no-untyped-call]

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is called in training: DistributedDataParallel where there are several processes.

        Its buffers are not broadcast: BN statistics are synchronized (`sync_bn`) or averaged (`average_buffers`).
        """
        if self.world_size == 1:
            return model
        options: dict[str, Any] = {BROADCAST: False, "device_ids": [self.device.index] if self.device.type == "cuda" else None}
        return DistributedDataParallel(model, **options)

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Make the BN statistics of all processes equal, their mean; to be called before scoring, testing and saving."""
        if self.world_size == 1:
            return
        for buffer in model.buffers():
            mean = self.all_reduce(buffer.double()) / self.world_size
            buffer.copy_(mean.round() if not buffer.is_floating_point() else mean)

    def uses_graph(self, mode: str) -> bool:
        """Return whether `runtime.mode` means a captured graph here; a CPU has none and runs the same loop eagerly.

        `auto` is a graph on one CUDA device; `utils/stepper.py` tries it against the eager step before it is used.
        """
        return mode != "eager" and self.device.type == "cuda" and self.world_size == 1

    def compiled(self, function: Any) -> Any:
        """Return the function compiled by torch, whole and for fixed shapes, when it is first called; on a CPU too."""
        return torch.compile(function, fullgraph=True, dynamic=False)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process do the block while the others wait, for a day if need be, then the others."""
        if self.rank > 0:
            dist.barrier(self.patient)
        yield
        if self.rank == 0 and self.world_size > 1:
            dist.barrier(self.patient)

    def leave(self) -> None:
        """End the connection with the other processes."""
        if self.world_size > 1:
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def choose_machine(gpu: str, amp: bool, alone: bool = False) -> Machine:
    """Return this process' machine as `--gpu`, `--amp` and torchrun's environment say; joins the other processes.

    `--gpu` is a CUDA number, one for each process (`0,1,2,3`), or `cpu`. Without a CUDA device every number means the
    CPU, and one line says so. `--amp` on a device without fast bf16 falls back to fp32, and one line says so.

    Args:
        alone: joins nobody, whatever the environment says.
    """
    place = Place() if alone else find_place()
    size, rank = place.size, place.rank
    if not alone and leftovers():
        logger.warning(
            f"warning: {', '.join(leftovers())}: ignored, for no launcher such as torchrun started this process: it runs alone"
        )
    device = choose_device(gpu, place.local if size > 1 else 0)
    if size > 1:
        join(device, size)
    if amp and not has_bf16(device):
        logger.info("--amp: this device has no bf16 instructions: running in fp32")
        amp = False
    return Machine(device, amp, rank, size, dist.new_group(backend="gloo", timeout=PATIENCE) if size > 1 else None)


def join(device: torch.device, size: int) -> None:
    """Meet the other processes.

    Raises:
        UserError: they did not come, or the address makes no sense.
    """
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT: {where}: the {size} processes (WORLD_SIZE) did not meet there ({reason}): "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None


def start_processes(gpu: str, check: Callable[[int], object]) -> None:
    """Where `--gpu` names several devices, start one process for each with torchrun and end with its exit code.

    Args:
        check: is given the number of processes before they are started; what it refuses, none of them has to.
    """
    numbers = device_numbers(gpu)
    if len(numbers) < 2 or launched() or not torch.cuda.is_available():
        return
    choose_device(gpu, 0)  # refuses numbers that are not there before anything is started
    check(len(numbers))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", f"--nproc_per_node={len(numbers)}", *sys.argv])
    except ChildFailedError as error:  # the process that failed has said why
        sys.exit(max(1, error.get_first_failure()[1].exitcode))
    except SignalException as stop:  # Ctrl-C or SIGTERM: torchrun has stopped its processes, and the first has said so
        sys.exit(128 + stop.sigval)
    sys.exit(0)


def device_numbers(gpu: str) -> list[int]:
    """Return the CUDA numbers of `--gpu`; none for `cpu`."""
    if gpu.strip().lower() == "cpu":
        return []
    parts = [part.strip() for part in gpu.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--gpu {gpu}: no device number: give one number, e.g. --gpu 0, several, --gpu 0,1, or --gpu cpu")
    if len(set(parts)) < len(parts):
        raise UserError(f"--gpu {gpu}: a device is named twice: name each once")
    return [int(part) for part in parts]


def choose_device(gpu: str, local: int) -> torch.device:
    """Return the device of the `local`-th process of this computer."""
    numbers = device_numbers(gpu)
    if not numbers:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        logger.info("no CUDA device here: running on the CPU (--gpu cpu asks for it)")
        return torch.device("cpu")
    number = numbers[local] if len(numbers) > 1 and local < len(numbers) else numbers[0] + local
    there = torch.cuda.device_count()
    if max(number, *numbers) >= there:
        raise UserError(f"--gpu {gpu}: there are {there} CUDA devices: give 0 to {there - 1}, and as many as processes")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def set_determinism(deterministic: bool, benchmark: bool) -> None:
    """Set cuDNN and torch as `seed.deterministic` and `seed.benchmark` say."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark and not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


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


def processor() -> str:
    """Return the processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
