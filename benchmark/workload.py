"""The work that is measured: each part of an epoch by this project's code, on random images with the paper's settings.

Functions that return `Work` prepare it, untimed; each call of the work runs it once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import count

import torch
from torch.utils.benchmark import Measurement, Timer
from torch.utils.flop_counter import FlopCounterMode

import ASD
from data.batches import draw_views, views
from data.sets import ImageSet
from data.transforms import normalize, random_crop, random_horizontal_flip, to_tensor
from engine.context import Context, build_context, build_state
from model.classifier import Classifier, build_classifier
from model.networks import resnet18_cifar
from utils.config import Config
from utils.config.schema import Named
from utils.config.settings import Backdoor, Loader, Runtime, Semi, SemiLoader, Transform, TransformTest, TransformTrain
from utils.draws import generator
from utils.runtime.machine import Machine

CLASSES = 10
SIDE = 32

Work = Callable[[], object]


def make_context(images: int, width: int, batch: int, device: torch.device, blocks: int = 2) -> Context:
    """Return the context of a run on random images, for a network of that width, in fp32.

    As in the paper, inference and the virtual model use batches twice as large as MixMatch.
    """
    crop = Named("random_crop", random_crop.Settings(SIDE, 4, "reflect"))
    flip = Named("random_horizontal_flip", random_horizontal_flip.Settings(0.5))
    remaining = (Named("to_tensor", to_tensor.Settings()), Named("normalize", normalize.Settings()))
    config = Config(
        network=Named("resnet18_cifar", resnet18_cifar.Settings(width=width, blocks=blocks)),
        backdoor=Backdoor(attack=Named("badnets", None)),
        transform=Transform(train=TransformTrain((crop, flip), remaining), test=TransformTest((), remaining)),
        semi=Semi(loader=SemiLoader(batch)),
        loader=Loader(2 * batch),
        runtime=Runtime("eager"),
    )
    rng = generator(0, "benchmark", images)
    pixels = torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=rng)
    labels = torch.randint(0, CLASSES, (images,), generator=rng)
    return build_context(config, Machine(device), ImageSet(pixels, labels).to(device))


def in_runtime(context: Context, runtime: Runtime) -> Context:
    """Return the same run with other `runtime` settings."""
    config = replace(context.config, runtime=runtime)
    return replace(context, config=config, machine=replace(context.machine, amp=runtime.amp))


def first(context: Context, images: int) -> Context:
    """Return the same run on the first images only, without copying."""
    return replace(context, train_set=context.train_set.part(slice(0, images)))


def fresh_model(context: Context) -> Classifier:
    """Return the network with its initial weights, in the memory format of the device."""
    model = build_classifier(context.config.network, CLASSES, context.config.seed.seed)
    return model.to(context.machine.device).to(memory_format=context.machine.memory_format)


# -- The parts of an epoch ---------------------------------------------------------------------------------------------


def feed(context: Context) -> Work:
    """Draw and compute one augmented view of every image."""
    n, batch = len(context.train_set), context.config.semi.loader.batch_size

    def work() -> None:
        draws = draw_views(0, "feed", 0, n, context.train_transform).to(context.machine.device)
        for _ in views(context.train_set, draws, context.train_transform, batch):
            pass

    return work


def mixmatch(pool: int, steps: int, context: Context) -> Work:
    """Train an epoch of `steps` MixMatch steps, including its draws; the clean pool is the first `pool` images."""
    semi = context.config.semi
    semi = replace(semi, mixmatch=replace(semi.mixmatch, train_iteration=steps))
    context = replace(context, config=replace(context.config, semi=semi))
    state = build_state(context.config, context.machine, len(context.train_set))
    state.stepper = ASD.mixmatch_steps(context, state)  # shared by all calls: the first one captures it
    epochs, clean_pool = count(), torch.arange(pool)
    return lambda: ASD.train_mixmatch(context, next(epochs), state, clean_pool)


def inference(context: Context) -> Work:
    """Compute the split losses of all images."""
    return partial(ASD.split_losses, context, 0, fresh_model(context))


def virtual_epoch(context: Context) -> Work:
    """Train a virtual model on all images."""
    model = fresh_model(context)
    virtual = ASD.build_virtual(context, model)  # shared by all calls: the first one captures it
    return partial(ASD.train_virtual_model, context, 0, model, virtual)


# -- Time and work -----------------------------------------------------------------------------------------------------


def timed(work: Work, least: float = 0.2) -> Measurement:
    """Measure the work after a warm-up, for at least `least` seconds, with torch's number of threads."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=least)


def step_gflop(width: int, batch: int) -> float:
    """Return the GFLOP of a MixMatch step on 2B forward passes and 3B with backward (a multiply-add counts as two)."""
    model = fresh_model(make_context(2, width, 2, torch.device("cpu")))
    images = torch.zeros(2, 3, SIDE, SIDE)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model(images)
    with FlopCounterMode(display=False) as both:
        model(images).sum().backward()
    return batch * (2 * forward.get_total_flops() + 3 * both.get_total_flops()) / 2e9
