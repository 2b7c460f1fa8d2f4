"""ASD.py's parts, in process: MixMatch steps, virtual model, split losses, split and accuracy against plain loops."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import small, train_here

import ASD
from ASD import mixmatch_step
from data.augment import Pipeline
from data.batches import MixMatchDraws, draw_mixmatch, draw_supervised, draw_views
from data.poisoned_sets.stored import StoredSet
from data.pools import pools_of
from data.sets import GroundTruth, ImageSet, Part, PoisonedData, RawData, TestSets
from defenses import none
from engine.context import Context, build_context, build_state, build_transforms
from engine.defense import DefenseBase
from engine.evaluation import evaluate
from engine.supervised import supervised_steps, train_supervised
from model.classifier import Classifier, build_classifier
from model.grouped_norm import group
from model.optimizer import build_optimizer
from utils import config as configuration
from utils.checkpoint import State
from utils.config import Config
from utils.errors import UserError
from utils.runtime.machine import Machine

FP32 = Machine(torch.device("cpu"), amp=False)
N, C = 45, 10  # images (no multiple of a batch), classes
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class DoublePipeline(Pipeline):
    """The same augmentation in float64, for comparisons with tight tolerances."""

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        return super().__call__(images, draws).double()


def settings(tiny: Path, *overrides: str) -> Config:
    """Return the tiny configuration with smaller batches, and with overrides."""
    return configuration.load(tiny, ["loader.batch_size=16", *overrides])


def context(config: Config, train_set: ImageSet, augment: Pipeline | None = None) -> Context:
    """Return the context of a run, on the CPU in fp32; the augmentation is the configured one unless given."""
    fixed = build_context(config, FP32, train_set)
    return fixed if augment is None else dataclasses.replace(fixed, train_transform=augment)


def make_set(count: int = N, seed: int = 0) -> ImageSet:
    """Return random images with labels of every class."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 32, 32), generator=rng).to(torch.uint8)
    return ImageSet(images, torch.randperm(count, generator=rng) % C)


def make_model(config: Config, seed: int = 1) -> Classifier:
    """Return a fresh network whose BN statistics are not the initial ones."""
    model = build_classifier(config.network, C, seed)
    rng = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if "running" in name:
            drawn = torch.rand(buffer.shape, generator=rng)
            buffer.copy_(drawn + 0.5 if "var" in name else 0.2 * (drawn - 0.5))
    return model


def double_pipeline(config: Config) -> DoublePipeline:
    """Return the train augmentation in float64."""
    return DoublePipeline(config.transform.train.primary, config.transform.train.remaining, 32, 32)


def assert_same_state(one: nn.Module, other: nn.Module, atol: float = 1e-10) -> None:
    """Compare weights and BN buffers of two models."""
    theirs = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-8, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


# The references.


class SlowAdam:
    """Adam from its formula, on a list of parameters."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        self.parameters, self.lr, self.betas, self.eps, self.steps = parameters, lr, betas, eps, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    def step(self, gradients: typing.Sequence[Tensor]) -> None:
        """Move every parameter once."""
        self.steps += 1
        (b1, b2), t = self.betas, self.steps
        with torch.no_grad():
            for i, (p, g) in enumerate(zip(self.parameters, gradients, strict=True)):
                self.m[i] = b1 * self.m[i] + (1 - b1) * g
                self.v[i] = b2 * self.v[i] + (1 - b2) * g * g
                p -= self.lr * (self.m[i] / (1 - b1**t)) / ((self.v[i] / (1 - b2**t)).sqrt() + self.eps)


def swap_groups(rows: list[Any], batch: int) -> list[Any]:
    """Interleave a list of 3 * batch rows: group i of block 0 against group i of block i, i = 1, 2."""
    blocks = [rows[:batch], rows[batch : 2 * batch], rows[2 * batch :]]
    third, remainder = batch // 3, batch % 3
    sizes = [third, third + (remainder == 2), third + (remainder >= 1)]
    ends = [sizes[0], sizes[0] + sizes[1], batch]
    for i in (1, 2):
        for offset in range(ends[i - 1], ends[i]):
            blocks[0][offset], blocks[i][offset] = blocks[i][offset], blocks[0][offset]
    return [row for block in blocks for row in block]


def slow_mixmatch_step(
    model: nn.Module, adam: SlowAdam, train_set: ImageSet, draw: MixMatchDraws, augment: Pipeline, temperature: float
) -> tuple[float, float, float]:
    """Run one MixMatch step row by row, as in the paper: three views, two guesses, three forward passes, one update."""
    batch = len(draw.labeled)

    def view(image: Tensor, draws: Tensor) -> Tensor:
        return augment(train_set.images[image][None], draws[None])[0]

    x = [view(draw.labeled[i], draw.views[i]) for i in range(batch)]
    u1 = [view(draw.unlabeled[i], draw.views[batch + i]) for i in range(batch)]
    u2 = [view(draw.unlabeled[i], draw.views[2 * batch + i]) for i in range(batch)]

    model.train()
    with torch.no_grad():
        p1, p2 = model(torch.stack(u1)).softmax(1).tolist(), model(torch.stack(u2)).softmax(1).tolist()
    guesses = []
    for a, b in zip(p1, p2, strict=True):
        powered = [((a[c] + b[c]) / 2) ** (1 / temperature) for c in range(C)]
        guesses.append([value / sum(powered) for value in powered])
    given = [[1.0 if c == int(train_set.labels[draw.labeled[i]]) else 0.0 for c in range(C)] for i in range(batch)]
    inputs, targets = x + u1 + u2, given + guesses + guesses

    lam = float(draw.lam)
    mixed_inputs, mixed_targets = [], []
    for i in range(3 * batch):
        j = int(draw.permutation[i])
        mixed_inputs.append(lam * inputs[i] + (1 - lam) * inputs[j])
        mixed_targets.append([lam * targets[i][c] + (1 - lam) * targets[j][c] for c in range(C)])

    shuffled = swap_groups(mixed_inputs, batch)
    logits: list[Tensor] = []
    for start in (0, batch, 2 * batch):
        logits += list(model(torch.stack(shuffled[start : start + batch])))
    logits = swap_groups(logits, batch)

    loss_x = loss_u = torch.zeros((), dtype=torch.float64)
    for i in range(3 * batch):
        probabilities = logits[i].exp() / logits[i].exp().sum()
        for c in range(C):
            if i < batch:
                loss_x = loss_x - mixed_targets[i][c] * probabilities[c].log() / batch
            else:
                loss_u = loss_u + (probabilities[c] - mixed_targets[i][c]) ** 2 / (2 * batch * C)
    loss = loss_x + float(draw.lambda_u) * loss_u
    adam.step(torch.autograd.grad(loss, adam.parameters))
    return loss.item(), loss_x.item(), loss_u.item()


def slow_scores(model: nn.Module, train_set: ImageSet, draws: Tensor, augment: Pipeline) -> list[float]:
    """Split loss of every image on its own: 0.1 CE + RCE, model in eval mode."""
    model = copy.deepcopy(model).eval()
    out = []
    for i in range(len(train_set)):
        with torch.no_grad():
            logits = model(augment(train_set.images[i : i + 1], draws[i : i + 1]))[0].tolist()
        top = max(logits)
        total = sum(math.exp(z - top) for z in logits)
        label, ce, rce = int(train_set.labels[i]), 0.0, 0.0
        for c, z in enumerate(logits):
            p = math.exp(z - top) / total
            if c == label:
                ce = math.log(total) + top - z
            else:
                rce -= max(p, 1e-7) * math.log(1e-4)
        out.append(0.1 * ce + rce)
    return out


def slow_virtual_model(
    config: Config, epoch: int, model: nn.Module, train_set: ImageSet, augment: Pipeline
) -> tuple[nn.Module, list[str]]:
    """Train a full copy with gradients in all layers and Adam on layer3, layer4 and linear; also return the trained names."""
    virtual = copy.deepcopy(model)
    names = [n for n, _ in virtual.named_parameters() if n.split(".")[1] in ("layer3", "layer4") or n.startswith("linear.")]
    optimizer = torch.optim.Adam([dict(virtual.named_parameters())[n] for n in names], lr=0.015)
    virtual.train()
    for i in range(config.meta.epoch):
        draws = draw_supervised(config.seed.seed, f"virtual {i}", epoch, len(train_set), augment)
        for start in range(0, len(train_set), config.loader.batch_size):
            stop = min(start + config.loader.batch_size, len(train_set))
            views = [augment(train_set.images[draws.order[k]][None], draws.views[k : k + 1]) for k in range(start, stop)]
            inputs = FP32.to_memory_format(torch.cat(views))  # another layout sums in another order
            labels = torch.stack([train_set.labels[draws.order[k]] for k in range(start, stop)])
            optimizer.zero_grad()
            nn.functional.cross_entropy(virtual(inputs), labels).backward()
            optimizer.step()
    return virtual, names


# One step, one epoch.


def draws_of(config: Config, train_set: ImageSet, augment: Pipeline, pool: Tensor, epoch: int = 3) -> MixMatchDraws:
    """Return an epoch's draws."""
    steps = config.semi.mixmatch.train_iteration
    weights = torch.linspace(2, 9, steps, dtype=torch.float64)
    return draw_mixmatch(config, epoch, pools_of(pool, len(train_set)), augment, weights)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("batch", [6, 7, 8])
def test_mixmatch_steps_are_those_of_the_paper(tiny: Path, batch: int, merged: bool) -> None:
    """Two MixMatch steps give the losses, weights and BN statistics of the method written out row by row, for batches
    divisible by three and others, and with merged forward passes (`runtime.merged`)."""
    config = settings(tiny, f"semi.loader.batch_size={batch}", "optimizer.Adam.eps=0.001", "semi.mixmatch.temperature=0.4")
    augment, train_set = double_pipeline(config), make_set()
    draws = draws_of(config, train_set, augment, torch.arange(0, N, 2))
    model = make_model(config).double()
    model.train()
    slow = copy.deepcopy(model)
    if merged:
        group(model)
    optimizer = build_optimizer(config.optimizer, model.parameters())
    adam = SlowAdam(list(slow.parameters()), 0.002, (0.9, 0.999), 0.001)
    for i in range(2):
        figures = mixmatch_step(context(config, train_set, augment), model, optimizer, draws.step(i))
        expected = slow_mixmatch_step(slow, adam, train_set, draws.step(i), augment, 0.4)
        assert not figures.requires_grad
        assert figures.tolist() == pytest.approx(expected, rel=1e-9)
        assert_same_state(model, slow)
    assert int(model.state_dict()["backbone.bn1.num_batches_tracked"]) == 10  # 2 guesses and 3 forwards a step


def make_state(config: Config, train_set: ImageSet) -> State:
    """Return the state of a run with BN statistics that are not the initial ones."""
    state = build_state(config, FP32, len(train_set))
    state.model.load_state_dict(make_model(config).state_dict())
    return state


def test_mixmatch_epoch_is_its_steps(tiny: Path) -> None:
    """An epoch is `train_iteration` steps with one Adam; it returns their means, while lambda_u ramps up."""
    config = settings(tiny, "optimizer.Adam.eps=0.001", "semi.criterion.mixmatch.rampup_length=5")
    augment, train_set, pool = double_pipeline(config), make_set(), torch.arange(10, 30)
    state = make_state(config, train_set)
    state.model.double().eval()  # as scoring might leave it
    slow = copy.deepcopy(state.model)
    adam = SlowAdam(list(slow.parameters()), 0.002, (0.9, 0.999), 0.001)
    means = ASD.train_mixmatch(context(config, train_set, augment), 3, state, pool)

    weights = [15 * min((3 + i / 3) / 5, 1) for i in range(3)]
    draws = draw_mixmatch(config, 3, pools_of(pool, N), augment, torch.tensor(weights, dtype=torch.float64))
    rows = [slow_mixmatch_step(slow, adam, train_set, draws.step(i), augment, 0.5) for i in range(3)]
    assert_same_state(state.model, slow)
    for key, values in zip(("loss", "loss_x", "loss_u"), zip(*rows, strict=True), strict=True):
        assert means[key] == pytest.approx(sum(values) / 3, rel=1e-5)  # summed in float32
    assert means["lambda_u"] == pytest.approx(sum(weights) / 3)


def test_labels_of_the_polluted_pool_are_ignored(tiny: Path) -> None:
    """Other labels in the polluted pool change no weight; one other label in the clean pool does."""
    config = settings(tiny)
    train_set, pool = make_set(), torch.arange(20)
    results = []
    for changed in (slice(0, 0), slice(20, N), slice(0, 20)):
        labels = train_set.labels.clone()
        labels[changed] = (labels[changed] + 1) % C
        state = make_state(config, train_set)
        ASD.train_mixmatch(context(config, ImageSet(train_set.images, labels)), 0, state, pool)
        results.append(state.model.state_dict())
    own, polluted, clean = results
    assert all(torch.equal(own[name], polluted[name]) for name in own)
    assert not all(torch.equal(own[name], clean[name]) for name in own)


# The virtual model.


@pytest.mark.parametrize("passes", [1, 2])
def test_virtual_model_is_a_plain_training_of_its_last_layers(tiny: Path, passes: int) -> None:
    """The virtual model equals a copy trained by a plain loop over all images with the labels they carry, including the
    last, smaller batch. Freezing the first layers does not change a bit, and the model itself does not change."""
    config = settings(tiny, f"meta.epoch={passes}")
    train_set = make_set()
    augment, _ = build_transforms(config, train_set)
    model = make_model(config)
    before = copy.deepcopy(model.state_dict())
    virtual = ASD.train_virtual_model(context(config, train_set), 4, model)
    slow, trained = slow_virtual_model(config, 4, model, train_set, augment)
    own, theirs = virtual.state_dict(), slow.state_dict()
    for name, tensor in own.items():
        if name in trained or "running" in name or "num_batches" in name:
            assert torch.equal(tensor, theirs[name]), name
            assert not torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert int(own["backbone.bn1.num_batches_tracked"]) == 3 * passes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["{Adam: {lr: 0.015}}", "{SGD: {lr: 0.05, momentum: 0.9, nesterov: true}}"])
def test_a_virtual_model_leaves_nothing_to_the_next(tiny: Path, optimizer: str) -> None:
    """A virtual model that reuses the tensors of an earlier epoch and another model equals a new one bit for bit: weights,
    BN statistics and counters, whatever moments its optimizer had."""
    config, train_set = settings(tiny, "meta.epoch=2", f"meta.optimizer={optimizer}"), make_set()
    fixed, model, other = context(config, train_set), make_model(config), make_model(config, seed=2)
    virtual = ASD.build_virtual(fixed, other)
    ASD.train_virtual_model(fixed, 4, other, virtual)
    addresses = [tensor.data_ptr() for kind in virtual.tensors().values() for tensor in kind]
    again = ASD.train_virtual_model(fixed, 5, model, virtual)
    assert again is virtual.model
    assert [tensor.data_ptr() for kind in virtual.tensors().values() for tensor in kind] == addresses
    new = ASD.train_virtual_model(fixed, 5, model).state_dict()
    assert all(torch.equal(tensor, new[name]) for name, tensor in again.state_dict().items())
    assert [p.requires_grad for p in again.parameters()] != [True] * len(list(again.parameters()))


def test_undefended_epoch_is_a_plain_training(tiny: Path) -> None:
    """`defense: none` trains all layers by plain SGD with momentum and weight decay, once on every image, and returns the
    mean loss."""
    config = settings(tiny, "defense=none", "undefended.batch_size=16")
    train_set, augment = make_set(), double_pipeline(config)
    state = make_state(config, train_set)
    state.model.double()
    slow = copy.deepcopy(state.model)
    losses = none.Defense(context(config, train_set, augment), torch.arange(0)).train_epoch(state, 0)

    draws = draw_supervised(config.seed.seed, "undefended", 0, N, augment)
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    slow.train()
    total = 0.0
    for start in range(0, N, 16):
        index = draws.order[start : start + 16]
        logits = slow(augment(train_set.images[index], draws.views[start : start + 16]))
        chosen = [-logits[k].log_softmax(0)[train_set.labels[i]] for k, i in enumerate(index)]
        total += sum(value.item() for value in chosen)
        gradients = torch.autograd.grad(sum(chosen) / len(index), list(slow.parameters()))
        with torch.no_grad():
            for k, (p, g) in enumerate(zip(slow.parameters(), gradients, strict=True)):
                velocity[k] = 0.9 * velocity[k] + g + 5e-4 * p
                p -= 0.1 * velocity[k]
    assert sorted(draws.order.tolist()) == list(range(N))
    assert_same_state(state.model, slow)
    assert losses["loss"] == pytest.approx(total / N, rel=1e-5)


# Scoring, splits, accuracy.


def test_split_losses_are_those_of_single_images(tiny: Path) -> None:
    """Each image's split loss is the symmetric cross-entropy of its own augmented view in eval mode; neither the model nor
    its mode changes."""
    config = settings(tiny)
    train_set = make_set()
    augment, _ = build_transforms(config, train_set)
    model = make_model(config)
    model.train()
    before = copy.deepcopy(model.state_dict())
    losses = ASD.split_losses(context(config, train_set), 2, model)
    draws = draw_views(config.seed.seed, "score", 2, N, augment)
    assert losses.dtype == torch.float32
    assert losses.std() > 0.01
    assert losses.tolist() == pytest.approx(slow_scores(model, train_set, draws, augment), rel=1e-4)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_size_of_scoring_batches_changes_no_decision(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger inference batches, as on CUDA, give the same split losses up to rounding, and exactly the same shares."""
    config, images = settings(tiny), make_set()
    fixed, model = context(config, images), make_model(config)
    tests = TestSets(images, ImageSet(images.images, images.labels.roll(1)), torch.arange(N))

    def figures() -> tuple[Tensor, dict[str, float | None]]:
        return ASD.split_losses(fixed, 2, model), evaluate(fixed, model, tests).shares

    sizes: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, _: sizes.append(len(inputs[0])) if isinstance(module, Classifier) else None
    )
    try:
        losses, shares = figures()
        assert max(sizes) == config.loader.batch_size
        monkeypatch.setattr(Machine, "inference_batch", lambda self, batch, pixels: 8 * batch)
        sizes.clear()
        in_one, same = figures()
        assert max(sizes) == N < 8 * config.loader.batch_size
    finally:
        hook.remove()
    assert in_one.tolist() == pytest.approx(losses.tolist(), rel=1e-5)
    assert same == shares


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_refused(tiny: Path, value: float) -> None:
    """If the network has diverged, one line names the epoch and the learning rate; no arbitrary pool is made."""
    config = settings(tiny)
    train_set = make_set()
    model = make_model(config)
    with torch.no_grad():
        model.linear.weight[0, 0] = value
    with pytest.raises(UserError) as caught:
        ASD.split_pools(context(config, train_set), 2, model, torch.arange(20))
    line = str(caught.value)
    assert "\n" not in line
    assert "epoch 3" in line
    assert "not finite" in line
    assert "learning rate of optimizer" in line


def class_aware(losses: list[float], labels: list[int], seeds: list[int], more: int) -> list[int]:
    """Stage 1 by sorting lists."""
    pool = list(seeds)
    for c in range(C):
        rows = sorted((losses[i], i) for i in range(len(labels)) if labels[i] == c and i not in seeds)
        pool += [i for _, i in rows[:more]]
    return sorted(pool)


def lowest_share(values: list[float], share: float) -> list[int]:
    """Stages 2 and 3 by sorting lists."""
    return sorted(i for _, i in sorted((v, i) for i, v in enumerate(values))[: int(len(values) * share)])


@pytest.mark.parametrize(
    ("first", "second", "third"), [(2, 4, 6), (0, 1, 3), (0, 0, 2), (3, 3, 4), (4, 4, 4), (2, 4, 4), (0, 3, 3)]
)
@pytest.mark.parametrize("keep_seeds", [False, True])
def test_stage_of_the_split_follows_the_epoch(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, first: int, second: int, third: int, keep_seeds: bool
) -> None:
    """In every epoch of every plan the clean pool is that of the epoch's stage, and only stage 3 trains a virtual model."""
    plan = [f"global.epoch_first={first}", f"global.epoch_second={second}", f"global.epoch_third={third}"]
    config = settings(tiny, *plan, f"num_epochs={third}", f"global.keep_seeds={str(keep_seeds).lower()}")
    train_set, model = make_set(), make_model(config)
    rng = torch.Generator().manual_seed(9)
    losses, virtual_losses = torch.rand(2, N, generator=rng).round(decimals=1)  # with ties
    seeds, virtual, asked = torch.arange(20), nn.Identity(), []

    def train_virtual(*args: Any) -> nn.Module:
        asked.append("train")
        assert args[2] is model
        return virtual

    def score(context: Context, epoch: int, which: nn.Module, **which_views: bool) -> Tensor:
        assert which_views == ({"virtual": True} if which is virtual else {})
        asked.append("virtual" if which is virtual else "model")
        assert which in (virtual, model)
        return virtual_losses if which is virtual else losses

    monkeypatch.setattr(ASD, "train_virtual_model", train_virtual)
    monkeypatch.setattr(ASD, "split_losses", score)
    for epoch in range(third):
        asked.clear()
        pool, values = ASD.split_pools(context(config, train_set), epoch, model, seeds)
        if epoch < first:
            expected = class_aware(losses.tolist(), train_set.labels.tolist(), seeds.tolist(), 2 * epoch)  # n 2, t 1
        elif epoch < second:
            expected = lowest_share(losses.tolist(), 0.5)
        else:
            expected = lowest_share((losses - virtual_losses).tolist(), 0.5)
        if epoch >= first and keep_seeds:
            expected = sorted({*expected, *seeds.tolist()})
        assert pool.tolist() == expected
        assert sorted(asked) == (["model", "train", "virtual"] if epoch >= second else ["model"])
        assert torch.equal(values, losses - virtual_losses if epoch >= second else losses)


def test_meta_split_by_hand(tiny: Path) -> None:
    """Stage 3 keeps the half whose split loss a real virtual model lowers least, and discards the virtual model."""
    config = settings(tiny)
    train_set, model = make_set(), make_model(config)
    augment, _ = build_transforms(config, train_set)
    before = copy.deepcopy(model.state_dict())
    virtual, _ = slow_virtual_model(config, 5, model, train_set, augment)
    purposes = (model, "score"), (virtual, "score virtual")
    one, two = (
        slow_scores(which, train_set, draw_views(config.seed.seed, purpose, 5, N, augment), augment)
        for which, purpose in purposes
    )
    falls = [a - b for a, b in zip(one, two, strict=True)]
    pool, values = ASD.split_pools(context(config, train_set), 5, model, torch.arange(20))
    assert values.tolist() == pytest.approx(falls, rel=1e-3, abs=1e-3)
    assert pool.tolist() == lowest_share(values.tolist(), 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("batch", [2, 16, 64])
def test_accuracy_is_a_count(tiny: Path, batch: int) -> None:
    """Accuracy is the number of images that get their label divided by the number of images, also with a smaller last batch."""
    config = settings(tiny, f"loader.batch_size={batch}")
    test_set = make_set(43, seed=5)
    fixed = context(config, test_set)
    model = make_model(config)
    model.train()
    before = copy.deepcopy(model.state_dict())
    predicted = []
    alone = copy.deepcopy(model).eval()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    for image in test_set.images:
        with torch.no_grad():
            logits = alone(((image / 255 - mean) / std)[None])[0].tolist()
        predicted.append(max(range(C), key=lambda c: logits[c]))
    labels = [p if i >= 32 or i % 3 == 0 else (p + 1) % C for i, p in enumerate(predicted)]  # the last batch is all right
    right = sum(p == label for p, label in zip(predicted, labels, strict=True))
    assert right == 22
    assert len(set(predicted)) > 1
    labeled = ImageSet(test_set.images, torch.tensor(labels))
    figures, by_class = evaluate(fixed, model, TestSets(labeled, None))
    assert figures["clean_accuracy"] == right / 43
    assert {name for name, share in figures.items() if share is not None} == {"clean_accuracy"}
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    counts = [[0] * C for _ in range(C)]
    for label, p in zip(labels, predicted, strict=True):
        counts[label][p] += 1
    assert by_class is not None and by_class.clean.tolist() == counts and by_class[1:] == (None, None)
    assert evaluate(fixed, model, TestSets(None, None)) == (dict.fromkeys(figures), None)
    # The triggered images are other test images, so it is known what the model makes of each.
    shown, origin, wanted = torch.arange(20), torch.arange(20, 40), torch.arange(20) % C
    tests = TestSets(labeled, ImageSet(test_set.images[shown], wanted), origin)
    figures, by_class = evaluate(fixed, model, tests)
    assert figures == {
        "clean_accuracy": right / 43,
        "attack_success_rate": sum(predicted[i] == i % C for i in range(20)) / 20,
        "robust_accuracy": sum(predicted[i] == labels[20 + i] for i in range(20)) / 20,
        "clean_as_target": sum(predicted[20 + i] == i % C for i in range(20)) / 20,
    }
    triggered, successes = [[0] * C for _ in range(C)], [0] * C
    for i in range(20):
        triggered[labels[20 + i]][predicted[i]] += 1
        successes[labels[20 + i]] += predicted[i] == i % C
    assert by_class is not None and by_class.triggered is not None and by_class.successes is not None
    assert (by_class.clean.tolist(), by_class.triggered.tolist(), by_class.successes.tolist()) == (counts, triggered, successes)


# The threat model.


@pytest.mark.parametrize(
    "function",
    [
        ASD.split_pools,
        ASD.split_losses,
        ASD.train_virtual_model,
        ASD.build_virtual,
        ASD.train_mixmatch,
        ASD.mixmatch_step,
        DefenseBase.__init__,
        ASD.Defense.__init__,
        train_supervised,
        supervised_steps,
    ],
)
def test_ground_truth_cannot_reach_splits_and_training(function: Any) -> None:
    """No function that splits or trains has an argument that could hold the ground truth, at any depth."""
    hints = typing.get_type_hints(function)
    reachable, queue = set(), [hints[name] for name in inspect.signature(function).parameters if name != "self"]
    assert Any not in queue
    while queue:
        hint = queue.pop()
        if isinstance(hint, list):  # the arguments of a Callable
            queue += hint
            continue
        if hint in reachable:
            continue
        reachable.add(hint)
        queue += typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            queue += typing.get_type_hints(hint).values()
    assert not reachable & {GroundTruth, Part, StoredSet, PoisonedData, TestSets, RawData}
    assert ImageSet in reachable
    assert {field.name for field in dataclasses.fields(ImageSet)} == {"images", "labels", "placement"}


@pytest.mark.parametrize("name", ["none", "asd"])
def test_a_last_step_that_diverges_is_refused(tmp_path: Path, name: str) -> None:
    """No loss shows what the last step of an epoch did to the weights: they are checked before the epoch is saved."""
    config, path = small(
        tmp_path,
        name,
        "num_epochs=1",
        "global.epoch_first=1",
        "semi.mixmatch.train_iteration=1",
        "undefended.batch_size=200",
        "optimizer={SGD: {lr: 1.0e+38}}",
        "undefended.optimizer.SGD.lr=1.0e+38",
    )
    with pytest.raises(UserError, match=r"epoch 1: the .* not finite: lower the learning rate of (undefended\.)?optimizer"):
        train_here(config, path)
    assert not list(tmp_path.rglob("*.pt"))


def test_outputs_that_are_not_finite_have_no_figures(tiny: Path) -> None:
    """What such a model predicts has no meaning."""
    config, images = settings(tiny), make_set()
    model = make_model(config)
    with torch.no_grad():
        model.linear.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="the model's outputs are not finite"):
        evaluate(context(config, images), model, TestSets(images, None))


def test_a_virtual_model_that_diverges_names_its_own_learning_rate(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The remedy is in `meta`, not in the optimizer of the model, whose losses are finite."""
    config = settings(tiny)
    broken = make_model(config)
    with torch.no_grad():
        broken.linear.weight[0, 0] = math.nan
    monkeypatch.setattr(ASD, "train_virtual_model", lambda *_: broken)
    with pytest.raises(UserError, match=r"epoch 6: .* not finite .*learning rate of meta\.optimizer"):
        ASD.split_pools(context(config, make_set()), 5, make_model(config), torch.arange(20))
