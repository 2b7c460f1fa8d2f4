"""The rows of the benchmark: what is measured, in rounds in which baseline and variants take turns."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import ASD
from data.batches import draw_scoring
from data.pools import class_agnostic_split, rest
from utils.benchmark import reference as bench_reference
from utils.benchmark import setup as bench_setup
from utils.benchmark.reference import PictureSet
from utils.benchmark.setup import Bench, Kind, Training, fresh_model, make_bench, seconds
from utils.machine import has_bf16

Run = Callable[[], float]  # does the work once, returns the value in the row's unit


@dataclass(frozen=True)
class Sizes:
    """How much work one round does."""

    count: int  # images of the bench
    fed: int
    scored: int
    trained: int  # by the virtual model
    growth: tuple[int, ...]
    steps: int  # MixMatch steps a round, at least; as many as the labelled loader lives, at most `most_steps`
    most_steps: int
    side: int  # of the matrices whose product is the ceiling


CPU = Sizes(5_000, 2_048, 4_096, 1_280, (5_000, 20_000, 80_000), 6, 18, 2048)
CUDA = Sizes(50_000, 10_000, 10_000, 10_000, (5_000, 20_000, 80_000), 18, 40, 8192)
QUICK = Sizes(400, 64, 64, 48, (200, 400, 800), 2, 2, 64)


@dataclass(frozen=True)
class Variant:
    """One way to do a row's work."""

    name: str
    make: Callable[[], Run]  # sets up; not timed
    tag: str = "exact"  # exact, precision or algorithm
    proofs: tuple[str, ...] = ()  # its ratio is shown only if these hold
    gflop: float = 0.0  # work of one unit of value, where it is to be set beside the ceiling


@dataclass(frozen=True)
class Task:
    """A row: the baselines (the first is measured twice a round, for the noise floor) and the variants."""

    row: str
    unit: str  # img/s: more is better; ms, s: less is better
    baselines: list[Variant]
    variants: list[Variant]


@dataclass
class Measured:
    """What the rounds gave."""

    values: dict[str, list[float]] = field(default_factory=dict)
    first_s: dict[str, float] = field(default_factory=dict)  # the first call: warm-up, compiling, capture
    peak: dict[str, int] = field(default_factory=dict)  # CUDA bytes above what was held before


AGAIN = ", again"
PAUSE = 0.1  # seconds between two runs, in which a loader's workers fill their queue and fall silent


def measure(task: Task, rounds: int, device: torch.device) -> Measured:
    """Set everything up, call each once untimed, then let all take turns, round by round."""
    out, runs = Measured(), {}
    for variant in (*task.baselines, *task.variants):
        held = reset_peak(device)
        runs[variant.name] = variant.make()
        out.first_s[variant.name] = seconds(runs[variant.name], device)
        out.peak[variant.name] = torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else 0
    first = task.baselines[0].name
    runs[first + AGAIN] = runs[first]
    out.values = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(PAUSE)
            out.values[name].append(run())
    return out


def reset_peak(device: torch.device) -> int:
    """Forget the peak of CUDA memory; return the bytes held now."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return int(torch.cuda.memory_allocated(device))


def make_row(row: str, variant: str, value: float, unit: str, tag: str = "exact", against: str = "") -> dict[str, Any]:
    """Return a row without a ratio."""
    return {
        "row": row, "variant": variant, "value": value, "unit": unit, "ratio": None, "ratio_min": None, "ratio_max": None,
        "tag": tag, "against": against,
    }  # fmt: skip


def rows_of(task: Task, measured: Measured, proofs: dict[str, bool]) -> list[dict[str, Any]]:
    """Return a task's rows: medians, and the median, least and greatest of the rounds' ratios, above 1 where faster."""
    first = task.baselines[0]
    rows = [make_row(task.row, first.name, median(measured.values[first.name]), task.unit)]
    again = Variant(first.name + AGAIN, first.make)
    pairs = [(v, first) for v in (again, *task.baselines[1:])]
    pairs += [(v, b) for v in task.variants for b in task.baselines]
    for variant, baseline in pairs:
        ours, theirs = measured.values[variant.name], measured.values[baseline.name]
        more = task.unit == "img/s"
        ratios = [a / b if more else b / a for a, b in zip(ours, theirs, strict=True)]
        row = make_row(task.row, variant.name, median(ours), task.unit, variant.tag, baseline.name)
        if all(proofs.get(name, False) for name in variant.proofs):
            row |= {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
        else:
            row["ratio"] = "FAIL"
        rows.append(row)
    return rows


# -- The tasks ---------------------------------------------------------------------------------------------------------


def tasks(bench: Bench, sizes: Sizes, workers: list[int]) -> Iterator[Task]:
    """Yield the tasks one by one, so that only one holds its models."""
    data = bench_reference.pictures(bench)
    batch = bench.config.semi.loader.batch_size
    yield feed_task(bench.first(sizes.fed), data.first(sizes.fed), workers)
    for pool in sorted({100, 200, 1200, sizes.count // 2}):
        if batch <= pool <= sizes.count - batch:
            yield iteration_task(bench, data, pool, sizes, workers)
    yield scoring_task(bench.first(sizes.scored), data.first(sizes.scored), workers)
    yield virtual_task(bench.first(sizes.trained), data.first(sizes.trained), workers)
    yield split_task(data)


def references(workers: list[int], make: Callable[[int], Run]) -> list[Variant]:
    """Return a baseline for each number of workers; `make` sets one up."""
    return [Variant(f"reference, {count} workers", partial(make, count)) for count in workers]


def timed(work: Callable[[], object], device: torch.device, scale: float = 1.0) -> Run:
    """Return what measures the seconds, times `scale`, of some work."""
    return lambda: scale * seconds(work, device)


def rate(work: Callable[[], object], device: torch.device, count: int) -> Run:
    """Return what measures how many of the `count` images are done in a second."""
    return lambda: count / seconds(work, device)


def feed_task(bench: Bench, data: PictureSet, workers: list[int]) -> Task:
    """Return the row of making augmented views."""
    batch = bench.config.semi.loader.batch_size

    def reference(count: int) -> Run:
        return lambda: bench_reference.feed(bench, data, batch, count)

    resident = Variant("resident", lambda: partial(bench_setup.feed, bench, batch), "exact", ("crop_flip_normalize",))
    return Task("feed", "img/s", references(workers, reference), [resident])


def scoring_task(bench: Bench, data: PictureSet, workers: list[int]) -> Task:
    """Return the row of the split losses of all images."""
    bf16, device = has_bf16(bench.device), bench.device
    model, last = fresh_model(bench), fresh_model(bench, amp=bf16)

    def ours(work: Callable[..., object], network: Any, amp: bool) -> Callable[[], Run]:
        return lambda: rate(lambda: work(bench, network, amp), device, len(data))

    def reference(count: int) -> Run:
        return rate(lambda: bench_reference.score(bench, model, data, count), device, len(data))

    exact = ("crop_flip_normalize",)
    folded = (*exact, "folded_scoring")
    variants = [
        Variant("unfolded", ours(bench_setup.score_unfolded, model, False), "exact", exact),
        Variant("folded", ours(bench_setup.score, model, False), "exact", folded),
    ]
    if bf16:
        variants.append(Variant("folded bf16", ours(bench_setup.score, last, True), "precision", folded))
    return Task("scoring", "img/s", references(workers, reference), variants)


def virtual_task(bench: Bench, data: PictureSet, workers: list[int]) -> Task:
    """Return the row of the virtual model's training on all images of the bench."""
    bf16, device = has_bf16(bench.device), bench.device
    model, last = fresh_model(bench), fresh_model(bench, amp=bf16)

    def ours(network: Any, amp: bool, frozen: bool = True) -> Callable[[], Run]:
        def make() -> Run:
            context = bench.context(amp)
            virtual = ASD.build_virtual(context, network)  # for all rounds: captured in the first
            if not frozen:
                virtual.model.requires_grad_(True)
            return timed(lambda: ASD.train_virtual_model(context, 0, network, virtual), device)

        return make

    def reference(count: int) -> Run:
        return timed(lambda: bench_reference.virtual_epoch(bench, model, data, count), device)

    proofs = ("crop_flip_normalize", "frozen_virtual_step")
    variants = [
        Variant("all gradients", ours(model, False, frozen=False), "exact", proofs[:1]),
        Variant("frozen", ours(model, False), "exact", proofs),
    ]
    if bf16:
        variants.append(Variant("frozen bf16", ours(last, True), "precision", proofs))
    return Task(f"virtual epoch of {len(data)}", "s", references(workers, reference), variants)


def split_task(data: PictureSet) -> Task:
    """Return the row of the split itself, its pools made ready for training. It happens on the host."""
    n, host = len(data), torch.device("cpu")
    losses = torch.rand(n, generator=torch.Generator().manual_seed(3))
    array = losses.numpy()
    copied = Variant("reference", lambda: timed(lambda: bench_reference.split_and_copy(data, array, 0.5), host, 1000))
    tensors = Variant(
        "tensors", lambda: timed(lambda: rest(class_agnostic_split(losses, 0.5), n), host, 1000), "exact", ("split",)
    )
    return Task("split", "ms", [copied], [tensors])


def iteration_task(bench: Bench, data: PictureSet, pool: int, sizes: Sizes, workers: list[int]) -> Task:
    """Return the row of the MixMatch iteration with a clean pool of that size."""
    batch, width = bench.config.semi.loader.batch_size, bench.config.network.settings.width
    life = pool // batch  # steps until the labelled loader ends
    steps = life * math.ceil(sizes.steps / life) if life <= sizes.most_steps else sizes.most_steps
    gflop = bench_setup.iteration_gflop(width, batch)
    exact = ("crop_flip_normalize", "reference_step", "stepper")

    def variant(kind: Kind) -> Variant:
        proofs = exact + ("grouped_bn",) * kind.merged + ("graph_replay",) * (kind.graph and bench.device.type == "cuda")
        return Variant(
            kind.name, lambda: Training(bench, pool, steps, kind), "precision" if kind.amp else "exact", proofs, gflop
        )

    baselines = references(workers, lambda count: bench_reference.ReferenceTraining(bench, data, pool, steps, count))
    variants = [variant(kind) for kind in kinds(bench.device, few=pool != 100)]
    return Task(f"iteration, clean pool {pool}", "ms", baselines, variants)


def kinds(device: torch.device, few: bool) -> list[Kind]:
    """Return the variants of the iteration that the device can do; on CUDA only some of them where `few` is set."""
    if device.type != "cuda":
        bf16 = [Kind("resident bf16", amp=True)] * has_bf16(device)
        merged = [Kind("resident, merged", merged=True)] * (not few)
        return [Kind("resident"), *bf16, *merged]
    fastest = [Kind("graph bf16", amp=True, graph=True), Kind("graph bf16, merged", amp=True, graph=True, merged=True)]
    if few:
        return fastest
    compiled = Kind("graph bf16, merged, compiled", amp=True, graph=True, merged=True, compiled=True)
    return [Kind("eager"), Kind("eager bf16", amp=True), Kind("graph", graph=True), *fastest, compiled]


# -- Set beside the ceiling --------------------------------------------------------------------------------------------


def ceiling_rows(task: Task, measured: Measured, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Return each variant's TFLOP/s and share of the ceiling, on CUDA its peak memory and seconds of capture too.

    Args:
        ceilings: TFLOP/s of a product in "bf16", "TF32" and "fp32".
    """
    tf32 = "TF32" in ceilings and torch.backends.cudnn.allow_tf32  # what fp32 convolutions really use
    rows, full = [], "TF32" if tf32 else "fp32"
    for variant in task.variants:
        value = median(measured.values[variant.name])
        rate = variant.gflop / value  # GFLOP / ms = TFLOP/s
        ceiling = ceilings["bf16" if variant.tag == "precision" else full]
        calls = measured.first_s[variant.name]
        of_row = [("rate", rate, "TFLOP/s"), ("share of the matmul ceiling", 100 * rate / ceiling, "%")]
        if measured.peak[variant.name]:
            of_row.append(("peak memory", measured.peak[variant.name] / 2**20, "MiB"))
            of_row.append(("first call: warm-up, capture", calls, "s"))
        rows += [make_row(f"{task.row}: {name}", variant.name, number, unit, variant.tag) for name, number, unit in of_row]
    return rows


# -- Growth with the number of images ----------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Return the bytes of memory that this process has resident (Linux; elsewhere 0)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def growth(width: int, batch: int, sizes: Sizes, device: torch.device) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure training sets of several sizes; return rows, and the exponents of time and memory.

    Memory of an image is what an epoch keeps for it (pixels, label, draws, loss, count): bytes of the tensors, and what the
    process' resident set (on CUDA: the allocator) grew by.
    """
    rows, tensor_bytes, grown, benches = [], [], [], []
    for n in sizes.growth:
        gc.collect()
        before = held_bytes(device)
        bench = make_bench(n, width, batch, device)
        epoch = [
            draw_scoring(0, "score", 0, n, bench.augment).to(device), torch.zeros(n), torch.zeros(n, dtype=torch.int32),
            bench.train_set.images, bench.train_set.labels,
        ]  # fmt: skip
        tensor_bytes.append(sum(t.nbytes for t in epoch))
        grown.append(held_bytes(device) - before)
        benches.append(bench)
        rows.append(make_row(f"memory an image, N = {n}", "tensors", tensor_bytes[-1] / n, "bytes"))
        if grown[-1] > 0:  # a small set may fit into memory that was freed before
            rows.append(make_row(f"memory an image, N = {n}", "resident set", grown[-1] / n, "bytes"))
        del epoch
    trainings = [Training(bench, max(100, batch), sizes.steps, Kind("resident")) for bench in benches]
    for training in trainings:
        training()
    times = [min(column) for column in zip(*([t() for t in trainings] for _ in range(5)), strict=True)]
    work = []
    for n, bench, milliseconds in zip(sizes.growth, benches, times, strict=True):
        model = fresh_model(bench)
        bench_setup.score(bench.first(2 * batch), model, False)

        def epoch_work(bench: Bench = bench, model: Any = model) -> None:
            rest(class_agnostic_split(bench_setup.score(bench, model, False), 0.5), len(bench.train_set))

        work.append(seconds(epoch_work, device))
        rows.append(make_row(f"iteration, N = {n}", "resident", milliseconds, "ms"))
        rows.append(make_row(f"scoring and split, N = {n}", "folded", work[-1], "s"))
    fits = {
        "iteration": times,
        "scoring_and_split": work,
        "memory": tensor_bytes,
        "memory_per_image_tensors": [b / n for b, n in zip(tensor_bytes, sizes.growth, strict=True)],
    }
    if min(grown) > 0:
        fits["memory_per_image_resident"] = [b / n for b, n in zip(grown, sizes.growth, strict=True)]
    return rows, {name: bench_setup.exponent(sizes.growth, values) for name, values in fits.items()}


def held_bytes(device: torch.device) -> int:
    """Return the bytes in use on the device."""
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else resident_bytes()
