"""A quick measurement of a new CUDA device: the variants of the step, inference, a virtual epoch.

Results are printed immediately. A failing part costs one line, and the next part begins; the last line names what failed.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from functools import partial

import torch
from torch.utils.benchmark import timer

from benchmark import workload
from benchmark.workload import Work, in_runtime, timed
from engine.context import Context
from utils.config.settings import Loader, Runtime
from utils.reporting.best_effort import BestEffort
from utils.runtime.machine import has_bf16

IMAGES, STEPS, SIDE = 50_000, 200, 8192  # training images, steps of an epoch, side of the matrices of `product_tflops`


def look(device: torch.device, width: int, batch: int) -> list[str]:
    """Run all parts on the device; return the names of those that failed."""
    context = workload.make_context(IMAGES, width, batch, device)
    amp = has_bf16(device)
    fast, ceiling = in_runtime(context, Runtime("graph", amp=amp)), product_tflops(device, amp)
    parts: dict[str, Work] = {
        f"step: {name}": partial(step, in_runtime(context, runtime), ceiling) for name, runtime in variants(amp).items()
    }
    parts["inference"] = partial(inference, fast, (16, 32, 64, 128, 256, 512))
    parts["virtual epoch"] = partial(virtual, fast)
    attempts, began = BestEffort(), time.monotonic()
    for name, part in parts.items():
        print(f"-- {name} (at {time.monotonic() - began:.0f} s)", flush=True)
        attempts.attempt(name, part)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return [name for name in parts if name in attempts.failed]


def variants(amp: bool) -> dict[str, Runtime]:
    """Return the settings to compare, the slowest to set up last; `amp`: in bf16."""
    return {
        "eager": Runtime("eager", amp=amp),
        "graph": Runtime("graph", amp=amp),
        "graph + merged + compile": Runtime("graph", merged=True, compile=True, amp=amp),
    }


def product_tflops(device: torch.device, amp: bool) -> float:
    """Print and return the rate of a square matrix product in TFLOP/s, an upper bound for the steps."""
    dtype = torch.bfloat16 if amp else torch.float32
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * SIDE**3 / timed(lambda: torch.mm(a, b)).median / 1e12
    print(f"matrix product, {dtype}: {rate:.3g} TFLOP/s", flush=True)
    return rate


def step(context: Context, ceiling: float) -> None:
    """Print milliseconds per step, TFLOP/s (also as a share of `ceiling`), peak memory and time of the first epoch."""
    config, device = context.config, context.machine.device
    batch = config.semi.loader.batch_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start, work = timer(), workload.mixmatch(max(100, batch), STEPS, context)
    work()
    set_up = timer() - start
    took = timed(work).median / STEPS
    rate = workload.step_gflop(config.network.settings.width, batch) / took / 1000
    share = f"{rate:.3g} TFLOP/s ({100 * rate / ceiling:.0f} % of the product)"
    memory = f", peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB" if device.type == "cuda" else ""
    print(f"   {1000 * took:.3f} ms per step, {share}{memory}, first epoch including set-up {set_up:.1f} s", flush=True)


def inference(context: Context, batches: tuple[int, ...]) -> None:
    """Print images per second in eval mode for several values of `loader.batch_size`."""
    for batch in batches:
        config = replace(context.config, loader=Loader(batch))
        took = timed(workload.inference(replace(context, config=config))).median
        at_once = context.machine.inference_batch(batch, math.prod(context.eval_transform.output_size))
        rate = len(context.train_set) / took
        print(f"   batches of {at_once:5d}: {rate:9.0f} images per second", flush=True)


def virtual(context: Context) -> None:
    """Print the seconds of a virtual epoch over all images."""
    work = workload.virtual_epoch(context)
    work()  # untimed: the first run captures the step
    print(f"   {len(context.train_set)} images: {timed(work).median:.3f} s", flush=True)
