"""The machine that a run computes on: device, precision, memory format, and the other processes of the run."""

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
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import UserError, one_line
from utils.runtime.processes import Process, find_process, launched, leftovers

logger = logging.getLogger(__name__)
TIMEOUT = timedelta(minutes=10)  # of a collective operation: then the run ends
LONG_TIMEOUT = timedelta(days=1)  # rank 0 may train an attack's networks while the other ranks wait

# How many times larger the batches of inference are on CUDA: it takes 8 x 128 images of 32 x 32 to keep a large device busy.
# They need less memory than 128 in training, which keeps the outputs of all layers for the backward pass. Larger images keep it
# busy with fewer, and the first outputs of a network for 224 px need 14 GB for 2,048 images: so a batch has no more pixels.
INFERENCE = 8
MOST_PIXELS = INFERENCE * 128 * 32 * 32

# DistributedDataParallel's option to copy the buffers of rank 0 to the others in every forward pass. torch 2.13 renamed it and
# warns about the old name.
NAMES = ("forward_sync_buffers", "broadcast_buffers")
BROADCAST = next(name for name in NAMES if name in inspect.signature(DistributedDataParallel).parameters)


@dataclass(frozen=True)
class Machine:
    """What one process computes on. With several processes (torchrun), all of them do the same steps.

    Every batch is sharded: process r of n computes rows r * count // n to (r + 1) * count // n. Results on all rows (for the
    pools, the reported losses) are gathered first, so that all processes come to the same decisions.
    """

    device: torch.device
    amp: bool = False  # bf16 autocast
    rank: int = 0
    world_size: int = 1
    long_wait: Any = None  # group of the same processes that waits for `LONG_TIMEOUT`

    def autocast(self, cast_once: bool = False) -> contextlib.AbstractContextManager[None]:
        """Return the context of forward passes.

        Args:
            cast_once: cast each weight to bf16 once for all passes in the context. Only for passes without gradient:
                otherwise gradients would be summed in bf16, and weights cast without gradient would get none in a later
                pass (pytorch issue 65766).
        """
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cast_once)

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of images and convolution weights.

        On a CPU channels_last is 1.2 to 1.35 times as fast as the contiguous layout, also in fp32. The bf16 kernels of GPUs
        need it. For fp32 on a GPU it has not been measured.
        """
        return torch.channels_last if self.amp or self.device.type == "cpu" else torch.contiguous_format

    def to_memory_format(self, images: Tensor) -> Tensor:
        """Return the images in the memory format of this device (`memory_format`)."""
        return images.contiguous(memory_format=self.memory_format)

    def shard(self, count: int) -> slice:
        """Return this process's shard of `count` rows: all of them if there is one process."""
        return slice(self.rank * count // self.world_size, (self.rank + 1) * count // self.world_size)

    def inference_batch(self, batch: int, pixels: int = 32 * 32) -> int:
        """Return the batch size of inference, given that of training: on CUDA up to `INFERENCE` times as large.

        On a CPU larger batches are no faster. In eval mode images do not affect each other, so the results are the same up
        to rounding.

        Args:
            pixels: of an image.
        """
        return max(batch, min(INFERENCE * batch, MOST_PIXELS // pixels)) if self.device.type == "cuda" else batch

    def all_gather(self, rows: Tensor, count: int) -> Tensor:
        """Gather the shards of all processes into (count, ...), in order.

        Gradients flow into the rows of this process; those of other processes are constants.
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
        """Backpropagate the loss of a sharded batch, whose gradient is the sum over the processes.

        DistributedDataParallel averages the gradients instead, so the loss is scaled beforehand.
        """
        (loss * self.world_size).backward()  # type: ignore[no-untyped-call]

    def all_reduce(self, value: Tensor) -> Tensor:
        """Return the sum of a tensor over all processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value

    def agree(self, text: str) -> bool:
        """Return whether all processes pass the same text."""
        if self.world_size == 1:
            return True
        lowest = torch.tensor([int(sha256(text.encode()).hexdigest()[:15], 16)], device=self.device)
        highest = lowest.clone()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        dist.all_reduce(highest, dist.ReduceOp.MAX)
        return bool(lowest == highest)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training: DistributedDataParallel if there are several processes.

        Its buffers are not broadcast: BN statistics are synchronized (`sync_bn`) or averaged (`average_buffers`).
        """
        if self.world_size == 1:
            return model
        options: dict[str, Any] = {BROADCAST: False, "device_ids": [self.device.index] if self.device.type == "cuda" else None}
        return DistributedDataParallel(model, **options)

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Replace BN statistics by their mean over the processes; call it before inference and saving."""
        if self.world_size == 1:
            return
        for buffer in model.buffers():
            mean = self.all_reduce(buffer.double()) / self.world_size
            buffer.copy_(mean.round() if not buffer.is_floating_point() else mean)

    def uses_graph(self, mode: str) -> bool:
        """Return whether `runtime.mode` means a CUDA graph on this machine: `graph` or `auto`, on a single CUDA device.

        `utils/runtime/stepper.py` compares the graph with the eager step before it uses it. A CPU runs the same loop eagerly.
        """
        return mode != "eager" and self.device.type == "cuda" and self.world_size == 1

    def compiled(self, function: Any) -> Any:
        """Return the function, to be compiled by torch on its first call: without graph breaks, for fixed shapes."""
        return torch.compile(function, fullgraph=True, dynamic=False)

    @contextlib.contextmanager
    def first_alone(self) -> Iterator[None]:
        """Run the block on rank 0 first, then on the other ranks, which wait for up to `LONG_TIMEOUT`."""
        if self.rank > 0:
            dist.barrier(self.long_wait)
        yield
        if self.rank == 0 and self.world_size > 1:
            dist.barrier(self.long_wait)

    def leave(self) -> None:
        """Disconnect from the other processes, once rank 0, which may still be writing results, has come here too."""
        if self.world_size > 1:
            dist.barrier(self.long_wait)
            dist.destroy_process_group()

    def barrier(self) -> None:
        """Wait until all processes have called this."""
        if self.world_size > 1:
            dist.barrier()


def choose_machine(gpu: str, amp: bool, alone: bool = False) -> Machine:
    """Return the machine given by `--gpu`, `--amp` and torchrun's environment variables; connect to the other processes.

    Without a CUDA device every number means the CPU; on a device without fast bf16, `amp` falls back to fp32. Each is
    logged in one line.

    Args:
        gpu: number of a CUDA device, one for each process (`0,1,2,3`), or `cpu`.
        alone: ignore the environment variables and run as a single process.
    """
    process = Process() if alone else find_process()
    size, rank = process.world_size, process.rank
    if not alone and leftovers():
        logger.warning(
            f"warning: {', '.join(leftovers())}: ignored: this process was not started by torchrun, so it runs alone"
        )
    device = choose_device(gpu, process.local_rank if size > 1 else 0)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        join(device, size)
    if amp and not has_bf16(device):
        logger.info("--amp: ignored: this device has no bf16 instructions, running in fp32")
        amp = False
    return Machine(device, amp, rank, size, dist.new_group(backend="gloo", timeout=LONG_TIMEOUT) if size > 1 else None)


def join(device: torch.device, size: int) -> None:
    """Connect to the other processes.

    Raises:
        UserError: they cannot be reached, or the address is invalid.
    """
    try:
        cuda = device.type == "cuda"
        dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT, device_id=device if cuda else None)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"MASTER_ADDR:MASTER_PORT: {where}: cannot connect the {size} processes of WORLD_SIZE ({one_line(error)}): "
            "start them with torchrun, or unset WORLD_SIZE"
        ) from None


def start_processes(gpu: str, check: Callable[[int], object]) -> None:
    """If `gpu` names several devices, start one process for each with torchrun and exit with its exit code.

    Args:
        check: called with the number of processes before they are started; raises `UserError` to refuse it.
    """
    numbers = device_numbers(gpu)
    if len(numbers) < 2 or launched() or not torch.cuda.is_available():
        return
    choose_device(gpu, 0)  # refuses devices that do not exist before starting anything
    check(len(numbers))
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(["--standalone", f"--nproc_per_node={len(numbers)}", *sys.argv])
    except ChildFailedError as error:  # the failed process has reported why
        sys.exit(max(1, error.get_first_failure()[1].exitcode))
    except SignalException as stop:  # Ctrl-C or SIGTERM: torchrun has stopped its processes, and rank 0 has reported it
        sys.exit(128 + stop.sigval)
    sys.exit(0)


def device_numbers(gpu: str) -> list[int]:
    """Return the device numbers in `--gpu`; an empty list for `cpu`."""
    if gpu.strip().lower() == "cpu":
        return []
    parts = [part.strip() for part in gpu.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise UserError(f"--gpu {gpu}: expected device numbers, e.g. 0 or 0,1, or cpu")
    if len(set(parts)) < len(parts):
        raise UserError(f"--gpu {gpu}: each device may be given only once")
    return [int(part) for part in parts]


def choose_device(gpu: str, local: int) -> torch.device:
    """Return the device of process number `local` on this computer."""
    numbers = device_numbers(gpu)
    if not numbers:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        logger.info("no CUDA device found: running on the CPU (as with --gpu cpu)")
        return torch.device("cpu")
    if 1 < len(numbers) <= local:
        raise UserError(f"--gpu {gpu}: {len(numbers)} devices for more processes: name one for each, or the first one alone")
    number = numbers[local] if len(numbers) > 1 else numbers[0] + local
    count = torch.cuda.device_count()
    if max(number, *numbers) >= count:
        raise UserError(f"--gpu {gpu}: must be in 0..{count - 1}, one device for each process")
    return torch.device("cuda", number)


def set_determinism(deterministic: bool, benchmark: bool) -> None:
    """Configure cuDNN and torch for `seed.deterministic` and `seed.benchmark`."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA is initialized
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = benchmark and not deterministic
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if torch.cuda.is_available():  # with `warn_only`, the fused kernels of attention stay as they are: use the plain one
        for enable in (
            torch.backends.cuda.enable_flash_sdp,
            torch.backends.cuda.enable_mem_efficient_sdp,
            torch.backends.cuda.enable_cudnn_sdp,
        ):
            enable(not deterministic)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device has bf16 instructions (CUDA: Ampere or newer; CPU: AVX512_BF16, AMX or Arm's BF16)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported() and native_bf16())


def native_bf16() -> bool:
    """Return whether the processor's flags include bf16. oneDNN emulates it, slowly, on AVX512 alone."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    except OSError:
        return True  # no such file (macOS, Windows): rely on oneDNN
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def processor() -> str:
    """Return the processor's name and the instructions that torch uses, e.g. `AMD EPYC, AVX512, bf16`: times depend on both."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    name = names[0] if names else platform.processor() or platform.machine()
    bf16 = ["bf16"] if has_bf16(torch.device("cpu")) else []
    return ", ".join([name, torch.backends.cpu.get_cpu_capability(), *bf16])
