"""The benchmark's proofs: each variant gives the numbers of the plain way, in float64 on small inputs. True or false."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as TF

import ASD
from data.batches import MixMatchDraws, draw_mixmatch
from data.pools import class_agnostic_split, rest
from loss.mixmatch import ramp_up
from model.classifier import Classifier, virtual_copy
from model.folding import fold
from model.grouped_norm import group
from model.optimizer import build_optimizer
from utils.benchmark import reference as bench_reference
from utils.benchmark import setup as bench_setup
from utils.benchmark.setup import Bench, DoublePipeline, fresh_model, make_bench
from utils.config import Config, MixMatch
from utils.stepper import Stepper, changed_tensors

STEPS = 3
BATCH = 7  # no multiple of three: the interleaved groups differ in size


def close(device: torch.device) -> float:
    """Return what sums in another order may change; cuDNN chooses its order anew, and Adam divides by tiny gradients."""
    return 1e-12 if device.type == "cpu" else 1e-9


def crop_flip_normalize(device: torch.device) -> bool:
    """All 9 x 9 x 2 crops and flips: the very floats that torchvision makes of PIL images."""
    bench = make_bench(162, 2, BATCH, device)
    rows = [(top, left, mirrored) for top in range(9) for left in range(9) for mirrored in (0, 1)]
    table = torch.tensor(rows, dtype=torch.float64, device=device)
    made = bench.augment(bench.train_set.images, table).cpu()
    mean, std = bench.augment.mean, bench.augment.std
    for image, view, (top, left, mirrored) in zip(bench.train_set.images.cpu(), made, rows, strict=True):
        picture = TF.pad(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()), 4, padding_mode="reflect")
        picture = TF.crop(picture, top, left, 32, 32)
        picture = TF.hflip(picture) if mirrored else picture
        expected = TF.normalize(TF.to_tensor(picture), mean, std)
        same = torch.equal(view, expected) if device.type == "cpu" else torch.allclose(view, expected, rtol=0, atol=1e-6)
        if not same:  # CUDA divides by multiplying, a rounding apart
            return False
    return True


def small_bench(device: torch.device) -> Bench:
    """Return a bench of 40 images in float64 and a network of a few hundred weights."""
    return make_bench(40, 2, BATCH, device, blocks=1, pipeline=DoublePipeline)


def double_model(bench: Bench) -> nn.Module:
    """Return the network in float64, in train mode."""
    return fresh_model(bench).double().train()


def small_draws(bench: Bench) -> MixMatchDraws:
    """Return the draws of three steps in float64."""
    count, pool = len(bench.train_set), torch.arange(2 * BATCH)
    weights = ramp_up(60, STEPS, 15.0, 120)
    draws = draw_mixmatch(with_steps(bench), 0, pool, rest(pool, count), bench.augment, weights).to(bench.device)
    return draws._replace(lam=draws.lam.double(), lambda_u=draws.lambda_u.double())


def with_steps(bench: Bench) -> Config:
    """Return the bench's settings with as many steps an epoch as a proof does."""
    semi = replace(bench.config.semi, mixmatch=MixMatch(train_iteration=STEPS))
    return replace(bench.config, semi=semi)


def difference(a: nn.Module, b: nn.Module) -> float:
    """Return the greatest difference between two models' weights and buffers; infinite where one is not finite."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    worst = max(float((x.double() - y.double()).abs().max()) for x, y in pairs)
    return worst if worst == worst else float("inf")


def plain_loop(bench: Bench, model: nn.Module, draws: MixMatchDraws, capturable: bool = False) -> list[Tensor]:
    """Train with `ASD.mixmatch_step`, step by step; return what the steps return."""
    optimizer = build_optimizer(bench.config.optimizer, model.parameters(), capturable)
    return [ASD.mixmatch_step(bench.context(), model, optimizer, draws.step(i)) for i in range(STEPS)]


def reference_step(device: torch.device) -> bool:
    """The baseline's step and the method's step: the same losses, weights and buffers for the same inputs."""
    bench = small_bench(device)
    draws, ours, theirs = small_draws(bench), double_model(bench), double_model(bench)
    losses = plain_loop(bench, ours, draws)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.002)
    worst = 0.0
    for i in range(STEPS):
        draw = draws.step(i)
        index = torch.cat([draw.labelled, draw.unlabelled, draw.unlabelled])
        x, u1, u2 = bench.augment(bench.train_set.images[index], draw.views).split(BATCH)
        batch = (x, bench.train_set.labels[draw.labelled], u1, u2)
        step = bench_reference.reference_step(theirs, optimizer, batch, float(draw.lam), draw.permutation, float(draw.lambda_u))
        worst = max(worst, max(abs(a - b) for a, b in zip(step, losses[i].tolist(), strict=True)))
    return max(worst, difference(ours, theirs)) < close(device)


def stepper(device: torch.device) -> bool:
    """The stepper without capture and the plain loop: bit for bit the same weights and buffers."""
    bench = small_bench(device)
    draws, ours, plain = small_draws(bench), double_model(bench), double_model(bench)
    losses = plain_loop(bench, plain, draws)
    sums = through_stepper(bench, ours, draws, capture=False)
    exact = device.type == "cpu"  # CUDA's backward adds in no fixed order
    near = torch.allclose(sums.double(), torch.stack(losses).sum(0), rtol=1e-5, atol=0)  # the sums are kept in float32
    return near and difference(ours, plain) <= (0.0 if exact else close(device))


def through_stepper(bench: Bench, model: nn.Module, draws: MixMatchDraws, capture: bool) -> Tensor:
    """Train with the stepper; return the sums of losses."""
    optimizer = build_optimizer(bench.config.optimizer, model.parameters(), capturable=capture)

    def step(draw: MixMatchDraws) -> Tensor:
        return ASD.mixmatch_step(bench.context(), model, optimizer, draw)

    stepper = Stepper(step, partial(changed_tensors, model, optimizer), width=3, capture=capture, insist=True)
    return stepper.run(draws, bench_setup.quiet)


def graph_replay(device: torch.device) -> bool:
    """CUDA: the captured step, replayed, and the eager loop: the same weights and buffers.

    With the same fused optimizer within rounding; its learning rate is a float32 tensor, so from the eager optimizer it
    differs by that number's rounding.
    """
    bench = small_bench(device)
    draws, ours, plain, fused = small_draws(bench), double_model(bench), double_model(bench), double_model(bench)
    plain_loop(bench, plain, draws)
    plain_loop(bench, fused, draws, capturable=True)
    through_stepper(bench, ours, draws, capture=True)
    return difference(ours, fused) < close(device) and difference(ours, plain) < 1e-7


def grouped_bn(device: torch.device) -> bool:
    """The method's step with grouped BN, two forwards, and with five: the same losses, weights and buffers, three steps."""
    bench = small_bench(device)
    draws, ours, plain = small_draws(bench), group(double_model(bench)), double_model(bench)
    losses, merged = plain_loop(bench, plain, draws), plain_loop(bench, ours, draws)
    worst = float((torch.stack(merged) - torch.stack(losses)).abs().max())
    return max(worst, difference(ours, plain)) < close(device)


def moved_model(bench: Bench) -> nn.Module:
    """Return a network in float64 whose BN has weights and statistics of its own."""
    model = double_model(bench)
    rng = torch.Generator().manual_seed(1)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=rng, dtype=torch.float64) + 0.5)
    return model


def folded_scoring(device: torch.device) -> bool:
    """BN folded into the convolutions: none is left, and the losses of all images are the same."""
    bench = small_bench(device)
    model = moved_model(bench)
    images = bench.augment(bench.train_set.images, bench.augment.draw(40, torch.Generator()).to(device))
    folded = fold(model, images[:1])
    with torch.no_grad():
        worst = float((folded(images) - copy.deepcopy(model).eval()(images)).abs().max())
    gone = not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    single = make_bench(40, 2, BATCH, device, blocks=1)
    a, b = (score(single, model.float(), False) for score in (bench_setup.score, bench_setup.score_unfolded))
    return gone and worst < 1e-10 and torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def frozen_virtual_step(device: torch.device) -> bool:
    """The virtual model without gradients in its first parts: the layers that learn move bit for bit as with all gradients."""
    bench = small_bench(device)
    model = moved_model(bench)
    assert isinstance(model, Classifier)
    frozen, trained = virtual_copy(model)
    full = copy.deepcopy(model)
    names = {name for name, p in frozen.named_parameters() if any(p is q for q in trained)}
    expected = {
        name for name, _ in full.named_parameters() if name.startswith(("backbone.layer3", "backbone.layer4", "linear"))
    }
    learning = [p for name, p in full.named_parameters() if name in expected]
    optimizers = [build_optimizer(bench.config.meta.optimizer, weights) for weights in (trained, learning)]
    for i in range(STEPS):
        part = slice(10 * i, 10 * i + 10)
        images = bench.augment(bench.train_set.images[part], bench.augment.draw(10, torch.Generator()).to(device))
        for copied, optimizer in zip((frozen, full), optimizers, strict=True):
            copied.train()
            optimizer.zero_grad()
            F.cross_entropy(copied(images), bench.train_set.labels[part]).backward()
            optimizer.step()
    return names == expected and difference(frozen, full) <= (0.0 if device.type == "cpu" else close(device))


def split(device: torch.device) -> bool:
    """The split by tensors and the one by sorted lists: the same pools, ties included."""
    losses = torch.randint(0, 30, (101,), generator=torch.Generator().manual_seed(2)).double()
    pool = class_agnostic_split(losses, 0.5)
    clean, polluted = bench_reference.split(losses.numpy(), 0.5)
    return np.array_equal(pool.numpy(), clean) and np.array_equal(rest(pool, 101).numpy(), polluted)


Proof = Callable[[torch.device], bool]
PROOFS: tuple[str, ...] = (
    "crop_flip_normalize", "reference_step", "stepper", "grouped_bn", "folded_scoring", "frozen_virtual_step", "split",
)  # fmt: skip


def prove(device: torch.device) -> dict[str, bool]:
    """Return every proof's name and whether it holds; a proof that cannot be carried out is false."""
    names = (*PROOFS, "graph_replay") if device.type == "cuda" else PROOFS
    out = {}
    for name in names:
        proof: Proof = globals()[name]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out[name] = bool(proof(device))
        except Exception as error:
            print(f"proof {name}: {type(error).__name__}: {error}")
            out[name] = False
    return out
