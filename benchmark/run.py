"""The speed of each part of a run, compared with a conventional research script: `python -m benchmark --json FILE`.

Baselines and variants are measured alternately in one process. A ratio is the median over the rounds, with minimum and
maximum; the baseline compared with itself shows the noise. tests/test_equality.py checks that all of them compute the same
numbers up to rounding. They run in fp32 unless the name has bf16.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmark import first_look
from benchmark.rows import CPU, CUDA, QUICK, growth, rows
from benchmark.workload import make_context
from utils.cli import Parser
from utils.errors import UserError
from utils.files import check_writable, write_text
from utils.paths import user_path
from utils.runtime.machine import has_bf16, processor

HEAD = f"{'row':28s} {'variant':30s} {'ms':>10s} {'ratio (min to max)':28s} against"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, report; exit code 1 if a part of the first look failed."""
    options = parse(argv)
    device = torch.device(options.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    facts = machine_facts(device)
    print("\n".join(f"{name}: {value}" for name, value in facts.items()) + "\n", flush=True)
    if options.first_look:
        failed = first_look.look(device, options.width, options.batch)
        sys.exit(f"FAILED: {', '.join(failed)}" if failed else 0)
    report = {"machine": facts, "settings": vars(options)} | benchmark(options, device)
    if options.json:
        write_text(Path(options.json), json.dumps(report, indent=1) + "\n")
        print(f"written to {options.json}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the options.

    Raises:
        UserError: a number is out of range, or there is no such device.
    """
    parser = Parser(prog="python -m benchmark", description="The speed of each part of a run.", allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--width", type=int, help="channels of the network's stem (default: 16 on the CPU, 64 on CUDA)")
    parser.add_argument("--batch", type=int, default=64, help="labeled images of a MixMatch step (default 64)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of measurements (default 7)")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 4], help="loader workers of the baselines (default 0 4)")
    parser.add_argument("--json", metavar="FILE", help="also write all results to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it works; the times mean nothing")
    parser.add_argument("--first-look", action="store_true", help="CUDA: measure a new device in a few minutes")
    options = parser.parse_args(argv)
    options.width = options.width if options.width is not None else {"cpu": 16, "cuda": 64}[options.device]
    lowest = {"width": (options.width, 1), "rounds": (options.rounds, 1), "workers": (min(options.workers), 0)}
    for name, (value, least) in lowest.items():
        if value < least:
            raise UserError(f"--{name} {value}: must be at least {least}")
    if not 2 <= options.batch <= 100:
        raise UserError(f"--batch {options.batch}: must be in 2..100: the smallest clean pool has 100 images")
    options.workers = list(dict.fromkeys(options.workers))
    if options.first_look and options.device != "cuda":
        raise UserError("--first-look: needs --device cuda")
    for name in ("rounds", "workers", "json", "quick"):
        if options.first_look and getattr(options, name) != parser.get_default(name):
            raise UserError(f"--{name}: has no effect with --first-look: leave it out")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device found: leave the option out to measure the CPU")
    if options.json is not None:
        options.json = str(user_path(options.json, "--json"))
        if Path(options.json).is_dir():
            raise UserError(f"--json {options.json}: is a folder: give a file name")
        check_writable(Path(options.json))
    return options


def benchmark(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measure and print; return {rows, growth}."""
    sizes = QUICK if options.quick else CUDA if device.type == "cuda" else CPU
    context = make_context(sizes.images, options.width, options.batch, device)
    print(HEAD)
    table: list[dict[str, Any]] = []
    for row in rows(context, sizes, options.workers):
        for line in row.measure(options.rounds, sizes.least):
            table.append(line)
            print(text_of(line), flush=True)
    found = growth(lambda n: make_context(n, options.width, options.batch, device), sizes)
    for name, grown in found.items():
        times = ", ".join(f"{ms:.4g} ms at N = {n}" for n, ms in grown["ms"].items())
        print(f"growth of {name}: exponent {grown['exponent']:+.3f} ({times})")
    return {"rows": table, "growth": found}


def text_of(line: dict[str, Any]) -> str:
    """Return one line of the table as text."""
    ratio = "" if line["ratio"] is None else f"{line['ratio']:6.2f} ({line['ratio_min']:.2f} to {line['ratio_max']:.2f})"
    return f"{line['row']:28s} {line['variant']:30s} {line['ms']:10.4g} {ratio:28s} {line['against']}"


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Return the facts about the machine that a reader needs to judge the figures."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts = {"processor": processor(), "cores": cores, "threads": torch.get_num_threads(), "torch": str(torch.__version__)}
    facts |= {"python": platform.python_version(), "system": platform.platform(), "device": device.type}
    facts["bf16"] = has_bf16(device)
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cudnn": torch.backends.cudnn.version()}
    return facts
