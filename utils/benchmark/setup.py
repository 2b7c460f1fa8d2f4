"""What the benchmark measures: random data of a given size, and this project's own steps in their variants.

The bench files belong to the top floor, although they lie in utils/: they import data, model, loss and ASD.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import ASD
from data.augment import Pipeline
from data.batches import MixMatchDraws, draw_mixmatch, draw_scoring, views
from data.pools import rest
from data.sets import ImageSet
from data.transforms import normalize, random_crop, random_horizontal_flip, to_tensor
from loss.mixmatch import ramp_up
from loss.supervised import symmetric_cross_entropy
from model.batch_counters import count_at_end
from model.classifier import Classifier, build_classifier
from model.networks import resnet18_cifar
from utils.checkpoint import State
from utils.config import (
    Backdoor,
    Config,
    Loader,
    MixMatch,
    Runtime,
    Semi,
    SemiLoader,
    Transform,
    TransformTest,
    TransformTrain,
)
from utils.draws import generator
from utils.machine import Machine
from utils.schema import Named

CLASSES = 10
SIDE = 32


@dataclass(frozen=True)
class Bench:
    """Random images on a device, and the settings under which they are trained on."""

    config: Config
    train_set: ImageSet  # N random images
    augment: Pipeline

    @property
    def device(self) -> torch.device:
        """Where the images lie."""
        return self.train_set.images.device

    def machine(self, amp: bool = False) -> Machine:
        """Return the one process on that device."""
        return Machine(self.device, amp)

    def context(self, amp: bool = False) -> ASD.Context:
        """Return what a run on these images would have fixed."""
        return ASD.Context(self.config, self.machine(amp), self.train_set, self.augment)

    def first(self, count: int) -> Bench:
        """Return the same bench with the first images only; no copy is made."""
        return replace(self, train_set=ImageSet(self.train_set.images[:count], self.train_set.labels[:count]))


class DoublePipeline(Pipeline):
    """The train augmentation in float64, for proofs."""

    def normalize(self, images: Tensor) -> Tensor:
        """Map uint8 (B, 3, H, W) to float64."""
        return super().normalize(images).double()


def make_bench(
    count: int, width: int, batch: int, device: torch.device, blocks: int = 2, pipeline: type[Pipeline] = Pipeline
) -> Bench:
    """Return a bench of `count` random images under the paper's settings, for a network of that width.

    Scoring and the virtual model use batches twice as large as MixMatch, as the paper does.
    """
    crop = Named("random_crop", random_crop.Settings(SIDE, 4, "reflect"))
    flip = Named("random_horizontal_flip", random_horizontal_flip.Settings(0.5))
    remaining = (Named("to_tensor", to_tensor.Settings()), Named("normalize", normalize.Settings()))
    settings = Config(
        network=Named("resnet18_cifar", resnet18_cifar.Settings(width=width, blocks=blocks)),
        backdoor=Backdoor(attack=Named("badnets", None)),
        transform=Transform(train=TransformTrain((crop, flip), remaining), test=TransformTest((), remaining)),
        semi=Semi(loader=SemiLoader(batch)),
        loader=Loader(2 * batch),
    )
    rng = generator(0, "benchmark", count)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, CLASSES, (count,), generator=rng)
    return Bench(settings, ImageSet(images, labels).to(device), pipeline((crop, flip), remaining, SIDE, SIDE))


def fresh_model(bench: Bench, amp: bool = False) -> Classifier:
    """Return the network with its first weights, on the bench's device, in the layout that runs there have."""
    model = build_classifier(bench.config.network, CLASSES, bench.config.seed.seed)
    return model.to(bench.device).to(memory_format=bench.machine(amp).memory_format)


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return how long `work` takes."""
    start = now(device)
    work()
    return now(device) - start


def quiet(numbers: Iterable[int]) -> Iterable[int]:
    """Show no progress."""
    return numbers


# -- MixMatch in the variants ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One variant of the iteration."""

    name: str
    amp: bool = False
    graph: bool = False
    merged: bool = False
    compiled: bool = False  # the losses of the step


class Training:
    """MixMatch on a bench with a clean pool of the first images; a call trains `steps` steps.

    Its draws are made inside the call: a loader does that work too.
    """

    def __init__(self, bench: Bench, pool: int, steps: int, kind: Kind) -> None:
        mixmatch = MixMatch(train_iteration=steps)
        self.config = replace(
            bench.config,
            semi=replace(bench.config.semi, mixmatch=mixmatch),
            runtime=Runtime("graph" if kind.graph else "eager", kind.merged, kind.compiled, kind.amp),
        )
        self.bench, self.machine, self.steps = bench, bench.machine(kind.amp), steps
        self.clean_pool = torch.arange(pool)
        self.polluted_pool = rest(self.clean_pool, len(bench.train_set))
        self.state: State = ASD.build_state(self.config, self.machine, len(bench.train_set))
        self.state.model.train()
        self.epoch = 0
        self.context = ASD.Context(self.config, self.machine, bench.train_set, bench.augment)
        self.stepper = ASD.mixmatch_steps(self.context, self.state)

    def draws(self) -> MixMatchDraws:
        """Return the tables of the next steps, on the device."""
        self.epoch += 1
        weights = ramp_up(self.epoch, self.steps, 15.0, 120)
        tables = draw_mixmatch(self.config, self.epoch, self.clean_pool, self.polluted_pool, self.bench.augment, weights)
        return tables.to(self.bench.device)

    def __call__(self) -> float:
        """Train; return the milliseconds a step."""
        with count_at_end(self.state.model, ASD.FORWARDS * self.steps):  # as in an epoch
            took = seconds(lambda: self.stepper.run(self.draws(), quiet).tolist(), self.bench.device)
        return 1000 * took / self.steps


# -- Everything else of an epoch ---------------------------------------------------------------------------------------


def feed(bench: Bench, batch: int) -> float:
    """Draw and make one augmented view of every image; return images a second."""
    n = len(bench.train_set)

    def work() -> None:
        draws = draw_scoring(0, "feed", 0, n, bench.augment).to(bench.device)
        for _ in views(bench.train_set, draws, bench.augment, batch):
            pass

    return n / seconds(work, bench.device)


def score(bench: Bench, model: nn.Module, amp: bool) -> Tensor:
    """Return the split losses (N,) as an epoch of the method finds them: BN folded."""
    return ASD.split_losses(bench.context(amp), 0, "score", model)


@torch.no_grad()
def score_unfolded(bench: Bench, model: nn.Module, amp: bool) -> Tensor:
    """Return the same losses (N,) from the model as it is, in eval mode."""
    machine, sce, n = bench.machine(amp), bench.config.split.criterion.sce, len(bench.train_set)
    draws = draw_scoring(bench.config.seed.seed, "score", 0, n, bench.augment).to(bench.device)
    model.eval()
    logits = []
    for images in views(bench.train_set, draws, bench.augment, bench.config.loader.batch_size):
        images = machine.lay_out(images)
        with machine.autocast():
            logits.append(model(images).float() if amp else model(images))
    model.train()
    return symmetric_cross_entropy(torch.cat(logits), bench.train_set.labels, sce.alpha, sce.beta).cpu()


def profile(training: Training, device: torch.device, rows: int = 25) -> str:
    """Return torch.profiler's table of a warm call: time by operator, on the device."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    training()
    with torch.profiler.profile(activities=activities) as found:
        training()
    order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table: str = found.key_averages().table(sort_by=order, row_limit=rows, max_name_column_width=50)
    return table


# -- Work and ceilings -------------------------------------------------------------------------------------------------


def gflop_per_image(width: int) -> tuple[float, float]:
    """Return the GFLOP of one image's forward, and of its forward and backward (a multiply-add counts two)."""
    bench = make_bench(2, width, 2, torch.device("cpu"))
    model, images = fresh_model(bench), torch.zeros(2, 3, SIDE, SIDE)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as both:
        model(images).sum().backward()
    return forward.get_total_flops() / 2e9, both.get_total_flops() / 2e9


def iteration_gflop(width: int, batch: int) -> float:
    """Return the GFLOP of a MixMatch step: 2B forwards, 3B forwards with backward."""
    forward, both = gflop_per_image(width)
    return batch * (2 * forward + 3 * both)


@contextlib.contextmanager
def tf32(on: bool) -> Any:
    """Allow TF32 in fp32 products inside the block, or forbid it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def matmul_tflops(device: torch.device, dtype: torch.dtype, side: int, allow_tf32: bool = False, tries: int = 5) -> float:
    """Return the best rate of a square product in TFLOP/s: the ceiling of everything else."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def work() -> None:
        for _ in range(4):
            torch.mm(a, b)

    with tf32(allow_tf32):
        work()
        best = min(seconds(work, device) for _ in range(tries))
    return 4 * 2 * side**3 / best / 1e12


def projected_seconds(iteration_ms: float, scoring_rate: float, virtual_s: float, tests: int = 19_000) -> float:
    """Return the seconds of the full run: 120 x 1024 steps, scoring and tests every epoch, 30 meta-splits.

    Args:
        scoring_rate: images a second.
        virtual_s: seconds of one virtual epoch on 50,000 images.
        tests: clean and backdoor test images, scored after every epoch.
    """
    training = 120 * 1024 * iteration_ms / 1000
    scoring = (150 * 50_000 + 120 * tests) / scoring_rate
    return training + scoring + 30 * virtual_s


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return e of the best fit values ~ sizes^e (least squares of the logarithms): 0 is flat, 1 is in proportion."""
    x, y = torch.tensor(sizes, dtype=torch.float64).log(), torch.tensor(values, dtype=torch.float64).log()
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum())
