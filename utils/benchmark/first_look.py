"""The first minutes on a new CUDA device: proofs, ceilings, the iteration in its variants, scoring, convolutions.

Every part prints as it goes. A part that fails prints one line, the next one begins, and the end names what failed. No part
starts after `STOP` seconds, so that the whole ends within 8 minutes. All parts also run on a CPU with small sizes: that is how
they are tested.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import ASD
from model.folding import fold
from utils.benchmark import proofs as bench_proofs
from utils.benchmark import setup as bench_setup
from utils.benchmark.setup import SIDE, Bench, Kind, Training, fresh_model, make_bench
from utils.machine import has_bf16
from utils.stepper import capture

STOP = 420.0  # seconds after which no part is started


def look(device: torch.device, width: int, batch: int) -> list[str]:
    """Run all parts on the device; return the names of those that failed."""
    began = time.monotonic()
    torch.backends.cudnn.benchmark = True
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        print(f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}, torch {torch.__version__}", flush=True)
    bench = make_bench(50_000, width, batch, device)
    found: dict[str, float] = {}  # the bf16 ceiling, by which the iterations are judged
    parts: list[tuple[str, Callable[[], None]]] = [
        ("proofs", partial(proofs, device)),
        ("ceilings", partial(ceilings, device, 8192, 2**30, found)),
        *((f"iteration: {kind.name}", partial(iteration, bench, kind, 200, found)) for kind in variants(has_bf16(device))),
        ("scoring", partial(scoring, bench, (128, 256, 512, 1000, 2000, 4000))),
        ("virtual epoch", partial(virtual, bench)),
        ("convolutions", partial(convolutions, device, width, (batch, 2 * batch, 3 * batch), found)),
    ]
    failed = [name for name, part in parts if not guarded(name, part, began)]
    print(f"done in {time.monotonic() - began:.0f} s", flush=True)
    return failed


def guarded(name: str, part: Callable[[], None], began: float) -> bool:
    """Run a part, or skip it if it is late; return False where it failed. A failure is one line, whatever raised it."""
    passed = time.monotonic() - began
    if passed > STOP:
        print(f"-- {name}: skipped, {passed:.0f} s have passed", flush=True)
        return True
    print(f"-- {name} (at {passed:.0f} s)", flush=True)
    try:
        part()
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        print(f"   FAILED: {type(error).__name__}: {first[:400]}", flush=True)
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True


def milliseconds(work: Callable[[], object], device: torch.device, tries: int = 10) -> float:
    """Return the mean time of `work` after a warm-up, on CUDA between two events."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        return 1000 * bench_setup.seconds(lambda: [work() for _ in range(tries)], device) / tries
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(tries):
        work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / tries


def proofs(device: torch.device) -> None:
    """Print every proof; one that is false is a failure."""
    held = bench_proofs.prove(device)
    for name, holds in held.items():
        print(f"   {name:24s} {'true' if holds else 'FALSE'}", flush=True)
    if not all(held.values()):
        raise AssertionError(f"false: {', '.join(name for name, holds in held.items() if not holds)}")


def ceilings(device: torch.device, side: int, size: int, found: dict[str, float]) -> None:
    """Print the rates of a square matrix product, and of copying memory of `size` bytes."""
    for name, dtype, allow in (("bf16", torch.bfloat16, False), ("TF32", torch.float32, True), ("fp32", torch.float32, False)):
        found[name] = bench_setup.matmul_tflops(device, dtype, side, allow)
        print(f"   matmul {name}: {found[name]:.3g} TFLOP/s", flush=True)
    a = torch.zeros(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy = milliseconds(lambda: b.copy_(a), device)
    add = milliseconds(lambda: torch.add(a, 1, out=b), device)
    print(f"   memory: copy {2 * size / copy / 1e6:.4g} GB/s, add {2 * size / add / 1e6:.4g} GB/s (read + written)", flush=True)


def variants(amp: bool) -> list[Kind]:
    """Return the iterations to compare, the one that takes longest to set up last; `amp`: in bf16."""
    return [
        Kind("eager", amp),
        Kind("graph", amp, graph=True),
        Kind("graph + merged + compile", amp, graph=True, merged=True, compiled=True),
    ]


def iteration(bench: Bench, kind: Kind, steps: int, found: dict[str, float]) -> None:
    """Print one variant's set-up seconds, milliseconds a step, TFLOP/s, memory."""
    device = bench.device
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    batch = bench.config.semi.loader.batch_size
    training = Training(bench, max(100, batch), steps, kind)
    draws = training.draws()
    set_up = bench_setup.seconds(lambda: training.stepper.run(draws, bench_setup.quiet), device)
    took = min(step_time(training, draws, device) for _ in range(3)) / steps
    rate = bench_setup.iteration_gflop(bench.config.network.settings.width, batch) / took
    share = f", {100 * rate / found['bf16']:.0f} % of bf16 matmul" if "bf16" in found else ""
    memory = f", peak {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB" if cuda else ""
    first = set_up - took * steps / 1000
    print(f"   {took:.3f} ms an iteration, {rate:.3g} TFLOP/s{share}{memory}, set-up {first:.1f} s", flush=True)
    table = bench_setup.seconds(training.draws, device)
    print(f"   the draws of {steps} steps: {1000 * table / steps:.4f} ms a step more", flush=True)


def step_time(training: Training, draws: Any, device: torch.device) -> float:
    """Return the milliseconds of all steps of the tables."""
    return milliseconds_once(lambda: training.stepper.run(draws, bench_setup.quiet), device)


def milliseconds_once(work: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, without warm-up."""
    if device.type != "cuda":
        return 1000 * bench_setup.seconds(work, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def scoring(bench: Bench, batches: tuple[int, ...]) -> None:
    """Print images a second in eval mode for several batch sizes: as it is, folded, and folded as a captured graph."""
    device, amp = bench.device, has_bf16(bench.device)
    machine = bench.machine(amp)
    model = fresh_model(bench, amp).eval()
    folded = fold(model, machine.lay_out(torch.zeros(1, 3, SIDE, SIDE, device=device)))
    for batch in batches:
        images = bench.train_set.images[:batch]
        views = bench.augment.draw(len(images), torch.Generator()).to(device)
        rates = []
        for network in (model, folded):
            rates.append(len(images) / milliseconds(partial(forward, bench, network, images, views), device) * 1000)
        text = f"   batch {len(images):5d}: unfolded {rates[0]:9.0f} img/s, folded {rates[1]:9.0f} img/s"
        if device.type == "cuda":
            forward(bench, folded, images, views)
            graph = capture(partial(forward, bench, folded, images, views))
            text += f", folded graph {len(images) / milliseconds(graph.replay, device) * 1000:9.0f} img/s"
        print(text, flush=True)


@torch.no_grad()
def forward(bench: Bench, network: nn.Module, images: Tensor, views: Tensor) -> Tensor:
    """Return the logits (B, C) of augmented views, in bf16 where the device has it."""
    machine = bench.machine(has_bf16(bench.device))
    with machine.autocast():
        out: Tensor = network(machine.lay_out(bench.augment(images, views)))
    return out


def virtual(bench: Bench) -> None:
    """Print the seconds of a virtual epoch and of a scoring pass over all images, as the method does them."""
    amp = has_bf16(bench.device)
    model = fresh_model(bench, amp)
    context = bench.context(amp)
    virtual_epoch = partial(ASD.train_virtual_model, context, 0, model, ASD.build_virtual(context, model))
    for name, work in (("virtual epoch", virtual_epoch), ("scoring pass", partial(bench_setup.score, bench, model, amp))):
        work()  # untimed: a step is captured in its first run
        took = bench_setup.seconds(work, bench.device)
        print(f"   {name} of {len(bench.train_set)} images: {took:.3f} s", flush=True)


def convolution_shapes(width: int) -> dict[tuple[int, ...], int]:
    """Return the network's convolutions, (in, out, kernel, stride, side of the input), and how often each comes."""
    shapes: dict[tuple[int, ...], int] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        shape = (module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], inputs[0].shape[2])
        shapes[shape] = shapes.get(shape, 0) + 1

    model = fresh_model(make_bench(1, width, 2, torch.device("cpu"))).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model(torch.zeros(1, 3, SIDE, SIDE))
    return shapes


def convolutions(device: torch.device, width: int, batches: tuple[int, ...], found: dict[str, float]) -> None:
    """Print each convolution's forward and forward + backward, bf16 with the channels last beside fp32 with them first."""
    for shape, times in convolution_shapes(width).items():
        for batch in batches:
            texts = []
            for name, dtype, layout in (
                ("bf16", torch.bfloat16, torch.channels_last),
                ("fp32", torch.float32, torch.contiguous_format),
            ):
                took = convolution(device, shape, batch, dtype, layout)
                work = 2 * batch * shape[0] * shape[1] * shape[2] ** 2 * (shape[4] // shape[3]) ** 2 / 1e9  # GFLOP
                texts.append(f"{name} {took[0]:.4f} / {took[1]:.4f} ms ({work / took[0]:.3g} TFLOP/s)")
            place = "x".join(map(str, shape[:3])) + f" stride {shape[3]} at {shape[4]}, {times} times"
            print(f"   {place:42s} batch {batch:3d}: {'; '.join(texts)}", flush=True)


def convolution(
    device: torch.device, shape: tuple[int, ...], batch: int, dtype: torch.dtype, layout: torch.memory_format
) -> tuple[float, float]:
    """Return the milliseconds of one convolution's forward, and of its forward and backward."""
    channels, out, kernel, stride, side = shape
    layer = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False).to(device, dtype).to(memory_format=layout)
    images = torch.randn(batch, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=layout)
    images.requires_grad_(channels > 3)  # the first layer's input needs none
    gradient = torch.ones_like(layer(images))

    def both() -> None:
        images.grad = layer.weight.grad = None
        layer(images).backward(gradient)

    with torch.no_grad():
        forward_ms = milliseconds(lambda: layer(images), device, 5)
    return forward_ms, milliseconds(both, device, 5)
