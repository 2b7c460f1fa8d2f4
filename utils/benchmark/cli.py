"""How fast the parts of a run are, beside the way most research scripts do them: `python -m utils.benchmark --json FILE`.

First each variant is proven equal to the plain way (a false proof gives FAIL instead of a ratio, and exit code 1). Then the
baseline and the variants take turns, round by round, in one process; a ratio is the median of the rounds' ratios, with the
least and the greatest; the baseline against itself is the noise floor.

Tags: exact: the same numbers up to rounding; precision: bf16 instead of fp32; algorithm: another method (none today).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils.benchmark import first_look as bench_first_look
from utils.benchmark import proofs as bench_proofs
from utils.benchmark import rows as bench_rows
from utils.benchmark import setup as bench_setup
from utils.benchmark.rows import CPU, CUDA, QUICK, Sizes
from utils.cli import Parser
from utils.errors import UserError
from utils.files import write_text
from utils.machine import has_bf16

LEAST_ROUNDS = 7
SMALLEST_POOL = 100


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, prove, measure, report; exit code 1 where a proof is false or a part of the first look failed."""
    options = parse(argv)
    device = torch.device(options.device)
    if options.first_look:
        stop_if("FAILED", bench_first_look.look(device, options.width, options.batch))
        return
    if options.profile:
        write_text(Path(options.profile), profiles(device, options.width, options.batch))
        print(f"written: {options.profile}")
        return
    sizes = QUICK if options.quick else CUDA if device.type == "cuda" else CPU
    print_machine(machine_facts(device))
    report = benchmark(device, options.width, options.batch, options.rounds, options.workers, sizes)
    if options.json:
        write_text(Path(options.json), json.dumps(report, indent=1) + "\n")
        print(f"written: {options.json}")
    stop_if("FALSE PROOFS", [name for name, holds in report["proofs"].items() if not holds])


def stop_if(what: str, names: list[str]) -> None:
    """End with exit code 1 where there is anything to name."""
    if names:
        print(f"{what}: {', '.join(names)}", file=sys.stderr)
        sys.exit(1)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the options.

    Raises:
        UserError: a number out of range, or a device that is not there.
    """
    parser = Parser(prog="python -m utils.benchmark", description="Proofs of equality, then speeds.", allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, help="channels of the network's stem (default: 16 on the CPU, 64 on CUDA)")
    parser.add_argument("--batch", type=int, default=64, help="labelled images of a MixMatch step (default 64)")
    parser.add_argument("--rounds", type=int, help=f"at least {LEAST_ROUNDS} (default {LEAST_ROUNDS}; with --quick 2)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4], help="loader workers of the baselines (default 0 4)")
    parser.add_argument("--json", metavar="FILE", help="also write everything there")
    parser.add_argument("--profile", metavar="FILE", help="write torch.profiler's table of the iteration there, and do no more")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: shows that it works, not how fast")
    parser.add_argument("--first-look", action="store_true", help="CUDA: what a new device can do, in under 8 minutes")
    options = parser.parse_args(argv)
    options.width = options.width if options.width is not None else {"cpu": 16, "cuda": 64}[options.device]
    options.rounds = options.rounds if options.rounds is not None else (2 if options.quick else LEAST_ROUNDS)
    least = 1 if options.quick else LEAST_ROUNDS
    if options.width < 1:
        raise UserError(f"--width {options.width}: give 1 or more (64 is ResNet-18)")
    if not 2 <= options.batch <= SMALLEST_POOL:
        raise UserError(f"--batch {options.batch}: give 2 to {SMALLEST_POOL}: the smallest clean pool has that many images")
    if options.rounds < least:
        raise UserError(f"--rounds {options.rounds}: give {least} or more (fewer than {LEAST_ROUNDS} only with --quick)")
    if min(options.workers) < 0:
        raise UserError(f"--workers {min(options.workers)}: give 0 (no worker processes) or more")
    options.workers = list(dict.fromkeys(options.workers))
    if options.first_look and options.device != "cuda":
        raise UserError("--first-look: is for a CUDA device: add --device cuda")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no CUDA device here: leave it out to measure the CPU")
    for name in ("json", "profile"):
        file = getattr(options, name)
        if file and Path(file).is_dir():
            raise UserError(f"--{name} {file}: is a folder: give the name of a file")
    return options


def benchmark(device: torch.device, width: int, batch: int, rounds: int, workers: list[int], sizes: Sizes) -> dict[str, Any]:
    """Prove, measure and print; return {machine, settings, proofs, rows, growth}."""
    cuda = device.type == "cuda"
    torch.backends.cudnn.benchmark = cuda
    proofs = bench_proofs.prove(device)
    for name, holds in proofs.items():
        print(f"proof {name:24s} {'true' if holds else 'FALSE'}")
    print(flush=True)
    rows: list[dict[str, Any]] = []

    def add(more: list[dict[str, Any]]) -> None:
        rows.extend(more)
        for row in more:
            print(line(row), flush=True)

    ceilings = {
        "bf16": bench_setup.matmul_tflops(device, torch.bfloat16, sizes.side),
        "fp32": bench_setup.matmul_tflops(device, torch.float32, sizes.side),
    }
    if cuda:
        ceilings["TF32"] = bench_setup.matmul_tflops(device, torch.float32, sizes.side, allow_tf32=True)
    bench = bench_setup.make_bench(sizes.count, width, batch, device)
    print(HEAD)
    add([bench_rows.make_row("matmul ceiling", name, rate, "TFLOP/s") for name, rate in ceilings.items()])
    for task in bench_rows.tasks(bench, sizes, workers):
        measured = bench_rows.measure(task, rounds, device)
        add(bench_rows.rows_of(task, measured, proofs))
        if task.row.startswith("iteration"):
            add(bench_rows.ceiling_rows(task, measured, ceilings))
        del measured
    if cuda:
        full = projection(rows, sizes)
        add([full] * math.isfinite(full["value"]))  # nan where no variant of a part is proven: JSON has no such number
    more, exponents = bench_rows.growth(width, batch, sizes, device)
    add(more)
    for name, exponent in exponents.items():
        print(f"growth of {name} with N: exponent {exponent:+.3f}")
    settings = {"width": width, "batch": batch, "rounds": rounds, "workers": workers, "images": sizes.count}
    return {"machine": machine_facts(device), "settings": settings, "proofs": proofs, "rows": rows, "growth": exponents}


def profiles(device: torch.device, width: int, batch: int, steps: int = 6) -> str:
    """Return the profiles of the iteration with a clean pool of 100 images, in fp32 and, where the device has it, in bf16."""
    facts = [f"{name}: {value}" for name, value in machine_facts(device).items()]
    bench, text = bench_setup.make_bench(5_000, width, batch, device), [*facts, f"width {width}, batch {batch}"]
    graph = device.type == "cuda"
    for amp in (False, True)[: 1 + has_bf16(device)]:
        kind = bench_setup.Kind("bf16" if amp else "fp32", amp=amp, graph=graph)
        training = bench_setup.Training(bench, SMALLEST_POOL, steps, kind)
        text += [f"\n{steps} iterations, {kind.name}{', graph' * graph}:", bench_setup.profile(training, device)]
    return "\n".join(text)


def projection(rows: list[dict[str, Any]], sizes: Sizes) -> dict[str, Any]:
    """Return the row of the full run's seconds, from the fastest proven iteration, scoring and virtual epoch."""

    def best(start: str, more: bool) -> float:
        values = [
            row["value"] for row in rows
            if row["row"].startswith(start) and row["unit"] in ("ms", "img/s", "s") and ": " not in row["row"]
            and isinstance(row["ratio"], float) and not row["variant"].startswith("reference")
        ]  # fmt: skip
        return (max if more else min)(values) if values else float("nan")

    virtual = best("virtual", False) * 50_000 / sizes.trained
    total = bench_setup.projected_seconds(best("iteration, clean pool 1", False), best("scoring", True), virtual)
    return bench_rows.make_row("projected full run", "fastest of each", total, "s", "precision")


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge the figures."""
    facts: dict[str, Any] = {
        "processor": processor(),
        "cores": core_count(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": device.type,
        "bf16": has_bf16(device),
    }
    if device.type == "cuda":
        facts |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def processor() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def core_count() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def print_machine(facts: dict[str, Any]) -> None:
    """Print the machine in one line a fact."""
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n", flush=True)


HEAD = f"{'row':34s} {'variant':30s} {'value':>12s} {'unit':8s} {'ratio (least to greatest)':28s} {'against':24s} tag"


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    ratio = "" if row["ratio"] is None else "FAIL"
    if isinstance(row["ratio"], float):
        ratio = f"{row['ratio']:6.2f}x ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    value = f"{row['value']:.4g}" if row["value"] < 1000 else f"{row['value']:.0f}"
    head = f"{row['row']:34s} {row['variant']:30s} {value:>12s} {row['unit']:8s}"
    return f"{head} {ratio:28s} {row['against']:24s} {row['tag']}"
