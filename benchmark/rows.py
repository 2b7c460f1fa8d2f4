"""The rows of the benchmark: what is compared. Baselines and variants are measured alternately, in rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmark import reference, workload
from benchmark.reference import MixMatchScript, Script
from benchmark.workload import Work, first, in_runtime, timed
from data.pools import class_agnostic_split, pools_of
from engine.context import Context
from utils.config.settings import Runtime
from utils.runtime.machine import has_bf16

AGAIN = ", again"
Make = Callable[[], Work]  # prepares the work


@dataclass(frozen=True)
class Sizes:
    """How much work is measured, and for how long."""

    images: int  # of the training set
    feed: int
    inference: int
    virtual: int
    steps: int  # MixMatch steps: whole passes of the baseline's labeled loader, at least this many, at most `most_steps`
    most_steps: int
    growth: tuple[int, ...]
    least: float = 0.2  # minimum seconds of a measurement


CPU = Sizes(5_000, 1_024, 2_048, 640, 6, 12, (5_000, 20_000, 80_000))
CUDA = Sizes(50_000, 10_000, 10_000, 10_000, 18, 40, (5_000, 20_000, 80_000))
QUICK = Sizes(400, 64, 64, 48, 2, 2, (200, 400, 800), least=0.01)


@dataclass(frozen=True)
class Row:
    """A comparison of ways to do the same work, by name.

    The first baseline is measured twice in each round; compared with itself, it shows the noise.
    """

    name: str
    baselines: dict[str, Make]
    variants: dict[str, Make]
    count: int = 1  # steps in one call

    def measure(self, rounds: int, least: float) -> list[dict[str, Any]]:
        """Call each way once, untimed, then measure all in turn, round by round; return the lines of the table.

        `ms` is the median over the rounds. A ratio is the median of the ratios within each round; it is above 1 if the way
        is faster than the baseline `against`.
        """
        works = {name: make() for name, make in (self.baselines | self.variants).items()}
        for work in works.values():
            work()
        base, *others = self.baselines
        works[base + AGAIN] = works[base]
        times: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(rounds):
            for name, work in works.items():
                times[name].append(1000 * timed(work, least).median / self.count)
        pairs = [(base, ""), *((name, base) for name in (base + AGAIN, *others))]
        pairs += [(name, baseline) for name in self.variants for baseline in self.baselines]
        lines = []
        for name, baseline in pairs:
            line: dict[str, Any] = {"row": self.name, "variant": name, "ms": median(times[name]), "against": baseline}
            line |= {"ratio": None, "ratio_min": None, "ratio_max": None}
            if baseline:
                ratios = [b / a for a, b in zip(times[name], times[baseline], strict=True)]
                line |= {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
            lines.append(line)
        return lines


def rows(context: Context, sizes: Sizes, workers: list[int]) -> Iterator[Row]:
    """Yield the rows one by one, so that the models of only one row are in memory."""

    def baselines(make: Callable[[int], Work]) -> dict[str, Make]:
        return {f"baseline, {count} workers": partial(make, count) for count in workers}

    fed, scored, trained = (first(context, n) for n in (sizes.feed, sizes.inference, sizes.virtual))
    ways = baselines(lambda count: Script(fed, count).feed)
    yield Row(f"feed, {sizes.feed} images", ways, {"resident": partial(workload.feed, fed)})

    batch = context.config.semi.loader.batch_size
    for pool in sorted({100, 200, 1200, sizes.images // 2}):
        if batch <= pool <= sizes.images - batch:
            life = pool // batch  # steps until the labeled loader is exhausted
            steps = life * math.ceil(sizes.steps / life) if life <= sizes.most_steps else sizes.most_steps
            ways = baselines(partial(MixMatchScript, context, pool, steps))
            chosen = step_runtimes(context.machine.device, few=pool != 100)
            variants = in_ways(context, chosen, partial(workload.mixmatch, pool, steps))
            yield Row(f"step, clean pool {pool}", ways, variants, steps)

    device = context.machine.device
    ways = baselines(lambda count: Script(scored, count).inference)
    yield Row(f"inference, {sizes.inference} images", ways, in_ways(scored, precisions(device, "eager"), workload.inference))
    ways = baselines(lambda count: Script(trained, count).virtual_epoch)
    variants = in_ways(trained, precisions(device, "graph" if device.type == "cuda" else "eager"), workload.virtual_epoch)
    yield Row(f"virtual epoch, {sizes.virtual} images", ways, variants)

    n, data = sizes.images, reference.pil_images(context.train_set)  # the split happens on the host
    losses = torch.rand(n, generator=torch.Generator().manual_seed(3))
    copied: dict[str, Make] = {"baseline": lambda: partial(reference.split, data, losses.numpy(), 0.5)}
    yield Row(f"split, {n} images", copied, {"tensors": lambda: lambda: pools_of(class_agnostic_split(losses, 0.5), n)})


def in_ways(context: Context, chosen: dict[str, Runtime], make: Callable[[Context], Work]) -> dict[str, Make]:
    """Return the same work with each of the chosen settings."""
    return {name: partial(make, in_runtime(context, runtime)) for name, runtime in chosen.items()}


def precisions(device: torch.device, mode: str) -> dict[str, Runtime]:
    """Return the settings of a run in fp32 and, if the device has it, in bf16."""
    return {mode: Runtime(mode)} | ({f"{mode}, bf16": Runtime(mode, amp=True)} if has_bf16(device) else {})


def step_runtimes(device: torch.device, few: bool) -> dict[str, Runtime]:
    """Return the settings with which a step is measured; `few`: fewer of them."""
    if device.type != "cuda":
        return precisions(device, "eager")
    if few:
        return precisions(device, "graph")
    fastest = Runtime("graph", merged=True, compile=True, amp=has_bf16(device))
    return precisions(device, "eager") | precisions(device, "graph") | {"graph + merged + compile, bf16": fastest}


def growth(make: Callable[[int], Context], sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Return how the time of a step and of inference grows with the number of images N: ms for each N, and the exponent.

    A step should not depend on N (exponent 0); inference is proportional to it (1).
    """
    contexts = [make(n) for n in sizes.growth]
    batch = contexts[0].config.semi.loader.batch_size
    parts: dict[str, Callable[[Context], Work]] = {
        "step": partial(workload.mixmatch, max(100, batch), sizes.steps),
        "inference": workload.inference,
    }
    found = {}
    for name, part in parts.items():
        calls = sizes.steps if name == "step" else 1
        times = [1000 * timed(part(context), sizes.least).median / calls for context in contexts]
        exponent = float(np.polyfit(np.log(sizes.growth), np.log(times), 1)[0])  # of the best fit ms ~ N^exponent
        found[name] = {"ms": dict(zip(map(str, sizes.growth), times, strict=True)), "exponent": exponent}
    return found
